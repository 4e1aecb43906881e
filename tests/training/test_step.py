"""The step on a model of one matrix: exact accumulation, clipping, steps that are skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.state import TrainState
from rla_jax.training.step import summed_gradient, train_step


def loss_sums(params, batch):
  """Summed squared errors of a linear model, and the number of rows that count."""
  error = jnp.einsum('bt,t->b', batch['x'], params['kernel']) - batch['y']
  return jnp.sum(batch['mask'] * error**2), jnp.sum(batch['mask'])


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  # Parts with unequal numbers of rows that count: a mean of means would be wrong.
  mask = np.array([1, 0, 0, 0, 1, 1, 1, 1], np.float32)
  return {'x': rng.normal(size=(8, 5)), 'y': rng.normal(size=8), 'mask': mask}


@pytest.fixture
def params():
  return {'kernel': jnp.linspace(-1.0, 1.0, 5)}


@pytest.fixture
def step(config):
  config.optimizer.warmup_steps = 0
  config.optimizer.clip_norm = 0.05
  optimizer = make_optimizer(config)
  function = functools.partial(
    train_step, loss_sums=loss_sums, optimizer=optimizer, config=config
  )
  zero = jnp.zeros((), jnp.int32)
  return jax.jit(function), lambda p: TrainState(zero, zero, p, optimizer.init(p))


@pytest.mark.parametrize('parts', [2, 4, 8])
def test_accumulation_is_exact(batch, params, parts):
  with jax.enable_x64(True):
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), batch)
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    (nll, count), gradient = summed_gradient(loss_sums, params, batch, parts)
    (wanted_nll, wanted_count), wanted = summed_gradient(loss_sums, params, batch, 1)
    assert count == wanted_count == 5
    np.testing.assert_allclose(nll, wanted_nll, rtol=1e-14)
    np.testing.assert_allclose(gradient['kernel'], wanted['kernel'], rtol=1e-13)


def test_step_is_that_of_optax_adamw(batch, params, step, config):
  step, start = step
  state, result = step(start(params), jax.tree.map(jnp.float32, batch))

  def mean_loss(p):
    nll, count = loss_sums(p, batch)
    return nll / count

  gradient = jax.grad(mean_loss)(params)
  assert float(result['grad_norm']) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
  assert float(result['grad_norm']) > config.optimizer.clip_norm  # So clipping is under test.
  reference = optax.chain(
    optax.clip_by_global_norm(config.optimizer.clip_norm),
    optax.adamw(float(result['learning_rate']), 0.9, 0.95, 1e-8, weight_decay=0.1),
  )
  updates, _ = reference.update(gradient, reference.init(params), params)
  wanted = optax.apply_updates(params, updates)
  np.testing.assert_allclose(state.params['kernel'], wanted['kernel'], rtol=1e-6)
  assert float(result['loss']) == pytest.approx(float(mean_loss(params)), rel=1e-5)


def test_steps_that_are_not_finite_change_nothing(batch, params, step):
  step, start = step
  batch = jax.tree.map(jnp.float32, batch)
  bad = {**batch, 'y': batch['y'].at[0].set(jnp.nan)}
  good_state, _ = step(start(params), batch)
  state = good_state
  for number in (1, 2):
    state, result = step(state, bad)
    assert int(result['bad_steps']) == number
    assert np.isnan(result['loss'])
  for before, after in zip(
    jax.tree.leaves((good_state.params, good_state.optimizer)),
    jax.tree.leaves((state.params, state.optimizer)),
    strict=True,
  ):
    np.testing.assert_array_equal(before, after)
  state, result = step(state, batch)
  assert int(result['bad_steps']) == 0
  assert int(state.step) == 4
  assert np.any(state.params['kernel'] != good_state.params['kernel'])


def test_a_spike_changes_nothing_once_the_rate_has_warmed_up(batch, params, config):
  config.max_spike = 3.0
  config.optimizer.warmup_steps = 2
  optimizer = make_optimizer(config)
  step = jax.jit(functools.partial(
    train_step, loss_sums=loss_sums, optimizer=optimizer, config=config
  ))  # fmt: skip
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(zero, zero, params, optimizer.init(params), usual_norm=jnp.zeros(()))
  batch = jax.tree.map(jnp.float32, batch)
  spike = {**batch, 'y': 100 * batch['y']}
  state, result = step(state, batch)
  assert float(state.usual_norm) == float(result['grad_norm'])
  state, result = step(state, spike)  # While the rate rises, norms may change as they like.
  assert int(result['bad_steps']) == 0
  state = state.replace(usual_norm=jnp.float32(step(state, batch)[1]['grad_norm']))
  after, result = step(state, spike)
  assert int(result['bad_steps']) == 1
  np.testing.assert_array_equal(after.params['kernel'], state.params['kernel'])
  assert float(after.usual_norm) == float(state.usual_norm)


def test_mean_of_the_parameters(batch, params, config):
  config.ema_decay = 0.75
  optimizer = make_optimizer(config)
  step = functools.partial(train_step, loss_sums=loss_sums, optimizer=optimizer, config=config)
  zero = jnp.zeros((), jnp.int32)
  state = TrainState(zero, zero, params, optimizer.init(params), ema=params)
  wanted = params['kernel']
  for _ in range(3):
    state, _ = step(state, jax.tree.map(jnp.float32, batch))
    wanted = 0.75 * wanted + 0.25 * state.params['kernel']
  np.testing.assert_allclose(state.ema['kernel'], wanted, rtol=1e-6)
  assert state.evaluated is state.ema
