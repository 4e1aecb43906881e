"""One token of the recurrence: the definition. Equation numbers are those of the derivation.

    p = S_{t-1}^T k                                     prediction of the base state      (1)
    r = clip(v - p)                                     residual                          (2)
    S_t = Diag(a) S_{t-1} + b k v^T                     additive update                   (3a)
    S_t = (I - b k k^T) Diag(a) S_{t-1} + b k v^T       delta update                      (3b)
    R_t = the same with r for v and g for b                                               (4)
    o = (Diag(a) S_{t-1})^T q + g R_t^T q               gated read-out                    (5)
    o = S_{t-1}^T q + R_t^T q                           summed read-out
    o = S_t^T q                                         base model (no residual state)
"""

import jax
import jax.numpy as jnp

from rla_jax.ops.inputs import Options
from rla_jax.ops.state import ResidualState
from rla_jax.shapes import Array


def advance(
  state: ResidualState,
  q_BHK: Array,
  k_BHK: Array,
  v_BHV: Array,
  log_decay_BHK: Array,
  beta_BH: Array,
  gamma_BH: Array | None,
  options: Options,
) -> tuple[ResidualState, Array]:
  """Advances the states by one token, in the states' dtype.

  `log_decay_BHK` is [B, H, K], or [B, H, 1] for a decay shared by the channels.

  Returns:
    The new state and o [B, H, V].
  """
  dtype = state.base.dtype
  q_BHK, k_BHK, v_BHV = (x.astype(dtype) for x in (q_BHK, k_BHK, v_BHV))
  decay_BHK1 = jnp.exp(log_decay_BHK.astype(dtype))[..., None]

  def read(state_BHKV, x_BHK):
    return jnp.einsum('bhkv,bhk->bhv', state_BHKV, x_BHK, precision='highest')

  def write(decayed_BHKV, value_BHV, rate_BH):
    if options.update == 'delta':
      value_BHV = value_BHV - read(decayed_BHKV, k_BHK)
    return decayed_BHKV + k_BHK[..., None] * (rate_BH[..., None] * value_BHV)[..., None, :]

  decayed_BHKV = decay_BHK1 * state.base
  base_BHKV = write(decayed_BHKV, v_BHV, beta_BH)
  if gamma_BH is None:
    return ResidualState(base_BHKV, None), read(base_BHKV, q_BHK)

  r_BHV = clip_residual(v_BHV - read(state.base, k_BHK), options.clip)
  residual_BHKV = write(decay_BHK1 * state.residual, r_BHV, gamma_BH)
  correction_BHV = read(residual_BHKV, q_BHK)
  if options.readout == 'gated':
    o_BHV = read(decayed_BHKV, q_BHK) + gamma_BH[..., None] * correction_BHV
  else:
    o_BHV = read(state.base, q_BHK) + correction_BHV
  return ResidualState(base_BHKV, residual_BHKV), o_BHV


def clip_residual(x: Array, bound: float | None) -> Array:
  """clip(x, -bound, bound); the gradient passes where |x| < bound, strictly. None: no clipping."""
  return x if bound is None else jax.lax.clamp(-bound, x, bound)
