"""Pallas kernels for TPU: residual linear attention and the residual delta rule, both states fused.

Three kernels: `inverse.py` inverts the triangular systems of all chunks (delta rule only),
`forward.py` and `backward.py` walk the chunks with both states on chip. `step.py` decodes.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from rla_jax.kernels.residual.tpu import blocks, call
from rla_jax.kernels.residual.tpu import step as step_module
from rla_jax.kernels.residual.tpu.blocks import Blocks, Rule
from rla_jax.kernels.residual.tpu.call import SAVED

MAX_HEAD = 256
DTYPES = ('bfloat16', 'float32')

__all__ = [
  'SAVED', 'Blocks', 'residual_attention', 'residual_attention_step', 'unsupported',
]  # fmt: skip


def unsupported(
  *,
  update: str,
  key_dim: int,
  value_dim: int,
  dtype: DTypeLike,
  channel_decay: bool,
  readout: str,
  residual: bool,
) -> str | None:
  """Why the kernels cannot serve a call, in one sentence that also says what would; or None."""
  del update, readout, residual  # All are served.
  dtype = jnp.dtype(dtype).name
  if channel_decay:
    return (
      'the TPU kernels take one decay a head, not one a channel; pass log_decay [B, T, H] or use '
      "implementation='chunked'"
    )
  if dtype not in DTYPES:
    return f'the TPU kernels take {" or ".join(DTYPES)} values, not {dtype}; cast q, k and v'
  for name, size in (('key', key_dim), ('value', value_dim)):
    if size > MAX_HEAD:
      return (
        f'the TPU kernels hold both states on chip: {name} size {size} of a head is above '
        f"{MAX_HEAD}; use smaller heads or implementation='chunked'"
      )
  return None


def residual_attention(
  q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, gamma_BTH, base_BHKV, residual_BHKV, segments_BT,
  *, update, clip, readout, chunk_size=None, interpret=False,
):  # fmt: skip
  """Runs the recurrence, equations 1-5, in its chunk form. Differentiable in every float argument.

  Args:
    q_BTGK: queries; G divides H and value head h reads head h // (H // G). bfloat16 throughout, or
      everything is computed in float32.
    k_BTGK: keys.
    v_BTHV: values.
    log_decay_BTH: float32, natural log of the decay, <= 0; below -87 it is a full reset.
    beta_BTH: float32 write strength of the base state.
    gamma_BTH: float32 write strength of the residual state, or None: no residual state.
    base_BHKV: float32 initial base state.
    residual_BHKV: float32 initial residual state; None exactly where gamma is.
    segments_BT: int32 index of a token's segment, non-decreasing along T; or None.
    update: 'additive' or 'delta'.
    clip: bound of the residual, or None.
    readout: 'gated' or 'sum'.
    chunk_size: 64 or 128 tokens; None: as the TPU's generation likes it. Interpretation also takes
      smaller powers of two from 8.
    interpret: False to compile for TPU; True or a pltpu.InterpretParams to interpret.

  Returns:
    o [B, T, H, V] in v's dtype, the final base state and the final residual state (or None), both
    float32 [B, H, K, V].

  Raises:
    ValueError: an unknown chunk size.
  """
  sizes = blocks.heuristic(chunk_size, interpret)
  rule = Rule(update == 'delta', gamma_BTH is not None, readout == 'gated', clip)
  return call.attend(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, gamma_BTH, base_BHKV, residual_BHKV,
    segments_BT, rule=rule, sizes=sizes, interpret=interpret,
  )  # fmt: skip


def residual_attention_step(
  q_BGK, k_BGK, v_BHV, log_decay_BH, beta_BH, gamma_BH, base_BHKV, residual_BHKV,
  *, update, clip, readout, interpret=False,
):  # fmt: skip
  """One token of `residual_attention`, without a gradient.

  Args:
    q_BGK, k_BGK, v_BHV, log_decay_BH, beta_BH, gamma_BH: one token of `residual_attention`'s.
    base_BHKV, residual_BHKV: states before the token.
    update, clip, readout, interpret: as `residual_attention`.

  Returns:
    (o [B, H, V] in v's dtype, base, residual or None) after the token.
  """
  rule = Rule(update == 'delta', gamma_BH is not None, readout == 'gated', clip)
  return step_module.step(
    q_BGK, k_BGK, v_BHV, log_decay_BH, beta_BH, gamma_BH, base_BHKV, residual_BHKV,
    rule=rule, interpret=interpret,
  )  # fmt: skip
