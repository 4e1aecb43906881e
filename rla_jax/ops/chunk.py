"""One chunk of the recurrence as matrix products. Equation numbers are those of the derivation.

    U = (I + diag(b) A)^-1 (b * (V - E K S0))     delta;     U = b * V       additive      (6)
    P = Ex K S0 + Px U,   r = clip(V - P)                                                  (7)
    W: the same as U with r for V, R0 for S0 and g for b                                   (8)
    O = E Q S0 + Ms U + g * (E Q R0 + Mi W)                                                (9)
    [S1 | R1] = carry [S0 | R0] + K_out^T [U | W]                                         (10)
"""

import functools

import jax
import jax.numpy as jnp

from rla_jax.ops.gram import Gram
from rla_jax.ops.inputs import Options
from rla_jax.ops.state import ResidualState
from rla_jax.ops.step import clip_residual
from rla_jax.ops.triangular import solve_with_inverse, unit_lower_inverse
from rla_jax.shapes import Array


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def scaled_product(scale_C1: Array, x_CK: Array, y_KV: Array, precision) -> Array:
  """scale (x y), with the derivative of (scale x) y: its transpose does not need x y again."""
  return scale_C1 * jnp.matmul(x_CK, y_KV, precision=precision)


@scaled_product.defjvp
def _(precision, primals, tangents):
  (scale_C1, x_CK, y_KV), (d_scale_C1, d_x_CK, d_y_KV) = primals, tangents
  tangent = jnp.matmul(d_scale_C1 * x_CK + scale_C1 * d_x_CK, y_KV, precision=precision)
  tangent += jnp.matmul(scale_C1 * x_CK, d_y_KV, precision=precision)
  return scaled_product(scale_C1, x_CK, y_KV, precision), tangent


def inverses(
  gram: Gram, beta_C: Array, gamma_C: Array | None, options: Options
) -> tuple[Array | None, Array | None]:
  """(I + diag(rate) A)^-1 of both states, which depend on neither values nor states."""
  if options.update == 'additive':
    return None, None
  rates = [beta_C] if gamma_C is None else [beta_C, gamma_C]
  stacked = jnp.stack([rate[..., None] * gram.erase for rate in rates])
  found = unit_lower_inverse(stacked)
  return found[0], None if gamma_C is None else found[1]


def write_values(
  gram: Gram, inverse_CC: Array | None, rate_C: Array, value_CV: Array, state_KV: Array, precision
) -> Array:
  """The rows that a chunk adds to a state: U of (6) or W of (8)."""
  rate_C1 = rate_C[..., None]
  if inverse_CC is None:
    return rate_C1 * value_CV
  erased_CV = value_CV - gram.read(gram.key, gram.decay_in, state_KV, precision)
  return solve_with_inverse(inverse_CC, rate_C1 * gram.erase, rate_C1 * erased_CV)


def residual_of(
  gram: Gram, u_CV: Array, v_CV: Array, base_KV: Array, options: Options, precision
) -> Array:
  """The clipped residual r of (7)."""
  predicted_CV = gram.read(gram.key, gram.decay_plain, base_KV, precision)
  predicted_CV += jnp.matmul(gram.predict, u_CV, precision=precision)
  return clip_residual(v_CV - predicted_CV, options.clip)


def read_out(
  gram: Gram,
  gamma_C: Array | None,
  u_CV: Array,
  w_CV: Array | None,
  state: ResidualState,
  options: Options,
  precision,
) -> Array:
  """o of (9), in its variants."""

  def read(within_CC, values_CV, decay, state_KV, rate_C1=1.0):
    rows_CK, scale_C1 = gram.query, rate_C1
    if gram.shared_decay:
      scale_C1 = rate_C1 * decay
    else:
      rows_CK = decay * rows_CK
    inside_CV = scaled_product(rate_C1, within_CC, values_CV, precision)
    return inside_CV + scaled_product(scale_C1, rows_CK, state_KV, precision)

  if gamma_C is None:
    return read(gram.upto, u_CV, gram.decay_in, state.base)
  if options.readout == 'sum':
    prediction_CV = read(gram.before_plain, u_CV, gram.decay_plain, state.base)
    return prediction_CV + read(gram.upto, w_CV, gram.decay_in, state.residual)
  prediction_CV = read(gram.before, u_CV, gram.decay_in, state.base)
  gamma_C1 = gamma_C[..., None]
  return prediction_CV + read(gram.upto, w_CV, gram.decay_in, state.residual, gamma_C1)


def carry_state(gram: Gram, state_KV: Array, values_CV: Array, precision) -> Array:
  """A state behind the chunk, (10)."""
  added = jnp.einsum('...ck,...cv->...kv', gram.key_out, values_CV, precision=precision)
  return gram.carry * state_KV + added


def advance_chunk(
  gram: Gram,
  state: ResidualState,
  v_CV: Array,
  beta_C: Array,
  gamma_C: Array | None,
  options: Options,
  precision,
) -> tuple[ResidualState, Array]:
  """(6) to (10): the state behind the chunk and o [B, H, C, V]."""
  inverse_b, inverse_g = inverses(gram, beta_C, gamma_C, options)
  u_CV = write_values(gram, inverse_b, beta_C, v_CV, state.base, precision)
  base_KV = carry_state(gram, state.base, u_CV, precision)
  if gamma_C is None:
    o_CV = read_out(gram, None, u_CV, None, state, options, precision)
    return ResidualState(base_KV, None), o_CV
  r_CV = residual_of(gram, u_CV, v_CV, state.base, options, precision)
  w_CV = write_values(gram, inverse_g, gamma_C, r_CV, state.residual, precision)
  residual_KV = carry_state(gram, state.residual, w_CV, precision)
  o_CV = read_out(gram, gamma_C, u_CV, w_CV, state, options, precision)
  return ResidualState(base_KV, residual_KV), o_CV
