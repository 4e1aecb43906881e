"""implementation="reference": one `lax.scan` step a token, float32 or float64. The definition.

Serves every call, differentiates to any order, and keeps a state per token for the gradient:
it is what everything else is tested against, not what one trains with.
"""

import jax
import jax.numpy as jnp

from rla_jax.ops.inputs import Inputs, Options, repeat_heads
from rla_jax.ops.state import ResidualState
from rla_jax.ops.step import advance
from rla_jax.shapes import Array, Values


def unsupported(inputs: Inputs, options: Options) -> str | None:
  """None: it serves every call."""
  del inputs, options
  return None


def run(inputs: Inputs, options: Options) -> tuple[Values, ResidualState]:
  """Runs the recurrence token by token. Returns o [B, T, H, V] in v's dtype and the final state."""
  heads = inputs.v.shape[2]
  dtype = inputs.state.base.dtype
  log_decay_BTHK = inputs.log_decay
  if log_decay_BTHK.ndim == 3:
    log_decay_BTHK = log_decay_BTHK[..., None]
  tokens = (
    repeat_heads(inputs.q, heads).astype(dtype),
    repeat_heads(inputs.k, heads).astype(dtype),
    inputs.v.astype(dtype),
    log_decay_BTHK,
    inputs.beta,
    inputs.gamma,
    _starts(inputs.segments),
  )

  def body(state, token):
    *token, start_B = token
    if start_B is not None:
      fresh_B = start_B[:, None, None, None]
      state = jax.tree.map(lambda s: jnp.where(fresh_B, 0, s), state)
    return advance(state, *token, options)

  time_major = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
  state, o_TBHV = jax.lax.scan(body, inputs.state, time_major)
  return jnp.moveaxis(o_TBHV, 0, 1).astype(inputs.v.dtype), state


def _starts(segments_BT):
  """True at the first token of every document but the first, which the initial state reaches."""
  if segments_BT is None:
    return None
  return jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0


def run_step(inputs: Inputs, options: Options) -> tuple[Array, ResidualState]:
  """Runs one token. Returns o [B, H, V] in v's dtype and the new state."""
  heads = inputs.v.shape[1]
  log_decay_BHK = inputs.log_decay if inputs.log_decay.ndim == 3 else inputs.log_decay[..., None]
  q_BHK, k_BHK = repeat_heads(inputs.q, heads), repeat_heads(inputs.k, heads)
  state, o_BHV = advance(
    inputs.state, q_BHK, k_BHK, inputs.v, log_decay_BHK, inputs.beta, inputs.gamma, options
  )
  return o_BHV.astype(inputs.v.dtype), state
