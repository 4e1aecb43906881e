"""The gates of the recurrence: decay alpha, write strengths beta and gamma. In float32 or better.

    decay              log alpha                                          after
    none               0
    fixed              log(1 - 2^(-5-h)) for head h                       RetNet
    scalar             -exp(A_log) softplus(x W + dt_bias)                Mamba-2, Gated DeltaNet
    channel            the same for every channel, W of low rank          Kimi Delta Attention
    channel_sigmoid    log_sigmoid(x W + bias) / 16, W of low rank        GLA

    write              beta
    sigmoid            sigmoid(x W), twice that with allow_neg_eigval
    one                1
    step               softplus(x W + dt_bias), the decay's own           Mamba-2

gamma = sigmoid(x W) with a W of its own, or beta.
"""

import jax
import jax.numpy as jnp

from rla_jax.layers.norms import at_least_float32
from rla_jax.layers.settings import Settings
from rla_jax.shapes import Array, Float, Gate, LogDecay

_SIGMOID_TEMPERATURE = 16.0
_STEP_RANGE = (1e-3, 1e-1)
_RATE_RANGE = (1.0, 16.0)


def gate_parameters(s: Settings, model_dim: int) -> dict:
  """Shape and initializer of every parameter of the gates, by name."""
  H, K, init = s.num_heads, s.head_dim, s.kernel_init
  rank = s.decay_rank or K
  parameters = {}
  if s.decay == 'scalar':
    parameters['decay_proj'] = (model_dim, H), init
    parameters['dt_bias'] = (H,), init_step_bias
  elif s.channel_decay:
    parameters['decay_down_proj'] = (model_dim, rank), init
    parameters['decay_up_proj'] = (rank, H * K), init
    bias = init_step_bias if s.decay == 'channel' else jax.nn.initializers.zeros
    parameters['dt_bias'] = (H * K,), bias
  if s.decay in ('scalar', 'channel'):
    parameters['A_log'] = (H,), init_log_rate
  if s.write == 'sigmoid':
    parameters['beta_proj'] = (model_dim, H), init
  if s.second_gate:
    parameters['gamma_proj'] = (model_dim, H), init
  return parameters


def compute_gates(
  s: Settings, params: dict, x: Float[Array, 'B T D']
) -> tuple[LogDecay | None, Gate | None, Gate | None]:
  """Natural log of the decay [B, T, H] or [B, T, H, K], beta and gamma [B, T, H]; float32.

  The gates' gradients are differences of large sums: a bf16 layer would lose their direction if
  they were computed in bf16. The products run at JAX's default matmul precision, under which inputs
  that come in bf16 are exact on every platform.

  Returns:
    None in place of a decay of 1, a beta of 1, or the gamma of a layer with one state.
  """
  x_BTD = x.astype(at_least_float32(x.dtype))
  logits = _one_a_head(s, params, x_BTD)
  log_decay, step = _log_decay(s, params, x_BTD, logits)
  beta_BTH = None
  if s.write == 'step':
    beta_BTH = step
  elif s.write == 'sigmoid':
    beta_BTH = (2.0 if s.allow_neg_eigval else 1.0) * jax.nn.sigmoid(logits['beta'])
  gamma_BTH = None
  if s.second_gate:
    gamma_BTH = jax.nn.sigmoid(logits['gamma'])
  elif s.gamma_is_beta:
    gamma_BTH = jnp.ones((*x.shape[:2], s.num_heads), x_BTD.dtype) if beta_BTH is None else beta_BTH
  return log_decay, beta_BTH, gamma_BTH


def _one_a_head(s, params, x_BTD):
  """x W of the gates that are one number a head, by name.

  One product for all of them, so that the gradient of x is one array and not the sum of several.
  Stacked, not side by side, they keep a split of the heads.
  """
  used = {'decay': s.decay == 'scalar', 'beta': s.write == 'sigmoid', 'gamma': s.second_gate}
  names = [name for name, is_used in used.items() if is_used]
  if not names:
    return {}
  kernels = [params[f'{name}_proj'].astype(x_BTD.dtype) for name in names]
  logits_BTNH = jnp.einsum('btd,dnh->btnh', x_BTD, jnp.stack(kernels, axis=1))
  return {name: logits_BTNH[:, :, i] for i, name in enumerate(names)}


def _log_decay(s, params, x_BTD, logits):
  """Log decay, and the step size where the decay has one."""
  B, T = x_BTD.shape[:2]
  H, K, dtype = s.num_heads, s.head_dim, x_BTD.dtype
  if s.decay == 'none':
    return None, None
  if s.decay == 'fixed':
    log_decay_H = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(H, dtype=dtype))))
    return jnp.broadcast_to(log_decay_H[None, None], (B, T, H)), None
  bias = params['dt_bias'].astype(dtype)[None, None]
  if s.decay == 'scalar':
    step_BTH = jax.nn.softplus(logits['decay'] + bias)
    return -jnp.exp(params['A_log'].astype(dtype))[None, None] * step_BTH, step_BTH
  down, up = (params[f'decay_{name}_proj'].astype(dtype) for name in ('down', 'up'))
  logit_BTHK = jnp.dot(jnp.dot(x_BTD, down), up) + bias
  logit_BTHK = logit_BTHK.reshape(B, T, H, K)
  if s.decay == 'channel_sigmoid':
    return jax.nn.log_sigmoid(logit_BTHK) / _SIGMOID_TEMPERATURE, None
  rate_H = jnp.exp(params['A_log'].astype(dtype))
  return -rate_H[None, None, :, None] * jax.nn.softplus(logit_BTHK), None


def init_log_rate(key, shape, dtype=jnp.float32):
  """A_log: the log of a rate that is uniform in [1, 16], as in Mamba-2."""
  low, high = _RATE_RANGE
  return jnp.log(jax.random.uniform(key, shape, dtype, low, high))


def init_step_bias(key, shape, dtype=jnp.float32):
  """dt_bias: softplus(dt_bias) is log-uniform in [0.001, 0.1], as in Mamba-2."""
  low, high = (jnp.log(jnp.asarray(bound, dtype)) for bound in _STEP_RANGE)
  step = jnp.exp(low + (high - low) * jax.random.uniform(key, shape, dtype))
  return step + jnp.log(-jnp.expm1(-step))
