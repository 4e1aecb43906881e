"""One step of training and one of evaluation: pure functions of a state and a batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rla_jax import sharding
from rla_jax.shapes import Array, Float
from rla_jax.training.optimizer import learning_rate
from rla_jax.training.state import TrainState
from rla_jax.training.statistics import norms

# Sums over a batch's targets of their negative log likelihoods in nats, and their number.
LossSums = tuple[Float[Array, ''], Float[Array, '']]
LossFn = Callable[[dict, dict[str, Array]], LossSums]


def train_step(
  state: TrainState,
  batch: dict[str, Array],
  *,
  loss_sums: LossFn,
  optimizer: optax.GradientTransformation,
  config: ConfigDict,
) -> tuple[TrainState, dict[str, Float[Array, '']]]:
  """Updates the parameters with the gradient of the mean loss over the batch's targets.

  A step whose loss or gradient is not finite leaves parameters and optimiser as they were, as does
  one whose gradient norm is more than config.max_spike times its running mean.

  Args:
    state: the state before.
    batch: arrays [B, T] of `rla_jax.data`.
    loss_sums: (params, batch) -> summed loss in nats, number of targets.
    optimizer: from `make_optimizer`.
    config: the whole config.

  Returns:
    The state after, and scalars: loss (mean, in nats a token), grad_norm (before clipping),
    learning_rate, tokens (targets of the batch), bad_steps; with config.statistics_every, norms of
    gradients and parameters by group.
  """
  if config.model.embedding_dropout > 0:
    rows = jax.tree.leaves(batch)[0].shape[0]
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    batch = {**batch, 'keys': jax.random.split(key, rows)}
  (nll, count), gradient = summed_gradient(loss_sums, state.params, batch, config.accumulate)
  count = jnp.maximum(count, 1)
  gradient = jax.tree.map(lambda g: g / count, gradient)
  norm = optax.tree.norm(gradient)
  extras = {}
  if config.statistics_every is not None:
    extras = norms(gradient, 'grad_norm') | norms(state.params, 'param_norm')
  clip = jnp.minimum(1.0, config.optimizer.clip_norm / norm)
  gradient = jax.tree.map(lambda g: g * clip, gradient)

  rate = learning_rate(state.step, config)
  updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
  params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates)

  good = jnp.isfinite(nll) & jnp.isfinite(norm)
  usual = state.usual_norm
  if usual is not None:
    known = state.step >= config.optimizer.warmup_steps
    good &= ~(known & (usual > 0) & (norm > config.max_spike * usual))
    usual = jnp.where(good, jnp.where(usual > 0, 0.98 * usual + 0.02 * norm, norm), usual)
  average = state.ema
  if average is not None:
    moved = jax.tree.map(lambda a, p: a + (1 - config.ema_decay) * (p - a), average, params)
    average = _select(good, moved, average)
  state = TrainState(
    step=state.step + 1,
    bad_steps=jnp.where(good, 0, state.bad_steps + 1),
    params=_select(good, params, state.params),
    optimizer=_select(good, optimizer_state, state.optimizer),
    ema=average,
    usual_norm=usual,
  )
  return state, {
    'loss': nll / count,
    'grad_norm': norm,
    'learning_rate': rate,
    'tokens': count,
    'bad_steps': state.bad_steps,
    **extras,
  }


def summed_gradient(loss_sums: LossFn, params, batch: dict[str, Array], parts: int):
  """Loss sums and the gradient of the summed loss, over the rows in so many parts, one by one.

  Sums only: whoever divides by the number of targets gets the mean over all of them, however they
  are spread over the parts. Row i is in part i mod parts, so that no row changes its device.

  Returns:
    ((summed loss, number of targets), gradient).
  """

  def value_and_grad(params, batch):
    sums, gradient = jax.value_and_grad(loss_sums, has_aux=True)(params, batch)
    return sums, sharding.as_stored(gradient)

  if parts == 1:
    return value_and_grad(params, batch)
  batch = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

  def add(total, part):
    return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

  part = jax.tree.map(lambda x: x[0], batch)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, params, part)
  )
  return jax.lax.scan(add, zeros, batch)[0]


def _select(good, new, old):
  return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
