"""Triton kernels of the residual recurrence for NVIDIA GPUs, called through jax-triton.

Five kernels: `prepare` and `forward`; `sweep`, `queries` and `keys` for the backward pass. Where
heads are few, `pair` takes the place of `forward`, with a program a state, and those of `split` let
parts of a sequence be walked side by side, by `forward` or, one state after the other, by those of
`apart`, which also walk large heads. That of `step` decodes. Importing this package needs no
Triton.
"""

import jax.numpy as jnp

_DTYPES = ('bfloat16', 'float16', 'float32')


def unsupported(
  *, update, key_dim, value_dim, dtype, channel_decay, readout, residual
) -> str | None:
  """Why the kernels cannot serve a call, and what would work; None if they can."""
  del update
  if channel_decay:
    return (
      'the Triton kernels take one decay a head; a decay per channel works with '
      'implementation="chunked"'
    )
  if residual and readout != 'gated':
    return (
      f'the Triton kernels read out "gated", not {readout!r}, which works with '
      'implementation="chunked"'
    )
  if jnp.dtype(dtype).name not in _DTYPES:
    return f'the Triton kernels take {", ".join(_DTYPES)}, not {jnp.dtype(dtype).name}'
  if not (1 <= key_dim <= 256 and 1 <= value_dim <= 256):
    return (
      f'the Triton kernels take K and V up to 256, not K={key_dim}, V={value_dim}; '
      'implementation="chunked" takes any'
    )
  return None


def residual_attention(
  q_BTGK,
  k_BTGK,
  v_BTHV,
  log_decay_BTH,
  beta_BTH,
  gamma_BTH,
  base_BHKV,
  residual_BHKV,
  segments_BT,
  *,
  update: str,
  clip: float | None,
  readout: str,
  chunk_size: int | None = None,
  interpret: bool = False,
):
  """The residual recurrence with both states in one fused pass (arXiv:2509.25223, eqs. 1 to 5).

  Args:
    q_BTGK: queries; G divides H and value head h reads head h // (H // G).
    k_BTGK: keys.
    v_BTHV: values, of q's and k's dtype: bfloat16, float16 or float32.
    log_decay_BTH: natural log of the decay, float32, <= 0, -inf for a full reset.
    beta_BTH: write strength of the base state, float32.
    gamma_BTH: write strength of the residual state, float32; None for the base model alone.
    base_BHKV: initial base state, float32.
    residual_BHKV: initial residual state, float32; None exactly where gamma is.
    segments_BT: int32 index of each token's document, from 0 upwards, or None.
    update: 'additive' or 'delta'.
    clip: bound of the residual, None for no bound.
    readout: 'gated'.
    chunk_size: tokens of a chunk: 16, 32 or 64; None for the tuned size.
    interpret: run on the host through Triton's interpreter, for tests.

  Returns:
    o_BTHV in v's dtype, and the final states in float32 (the residual one may be None).

  Raises:
    ValueError: chunk_size is not one that the kernels have.
    NotImplementedError: the call is `unsupported`.
  """
  from rla_jax.kernels.residual.gpu import blocks, call, launch

  T, K = k_BTGK.shape[1], k_BTGK.shape[3]
  B, _, H, V = v_BTHV.shape
  reason = unsupported(
    update=update,
    key_dim=K,
    value_dim=V,
    dtype=v_BTHV.dtype,
    channel_decay=log_decay_BTH.ndim == 4,
    readout=readout,
    residual=gamma_BTH is not None,
  )
  if reason:
    raise NotImplementedError(reason)
  if chunk_size not in (None, 16, 32, 64):
    raise ValueError(f'chunk_size is {chunk_size}; the Triton kernels have 16, 32 and 64')
  if T == 0 or B == 0:
    return jnp.zeros_like(v_BTHV), base_BHKV, residual_BHKV
  chosen = blocks.choose(
    None if interpret else launch.device_kind(),
    hopper=interpret or launch.is_hopper(),
    delta=update == 'delta',
    residual=gamma_BTH is not None,
    key_dim=K,
    value_dim=V,
    dtype=v_BTHV.dtype,
    heads=B * H,
    length=T,
  )
  if chunk_size is not None:
    chosen = blocks.with_chunk(chosen, chunk_size, 64 // chunk_size)
  config = call.Config(
    delta=update == 'delta',
    residual=gamma_BTH is not None,
    clip=None if clip is None else float(clip),
    blocks=chosen,
    interpret=interpret,
  )
  dtype = v_BTHV.dtype
  return call.attend(
    config,
    q_BTGK.astype(dtype),
    k_BTGK.astype(dtype),
    v_BTHV,
    log_decay_BTH,
    beta_BTH,
    gamma_BTH,
    base_BHKV,
    residual_BHKV,
    segments_BT,
  )


def residual_attention_step(
  q_BGK, k_BGK, v_BHV, log_decay_BH, beta_BH, gamma_BH, base_BHKV, residual_BHKV,
  *, update: str, clip: float | None, readout: str, interpret: bool = False,
):  # fmt: skip
  """One token of `residual_attention`, reading and writing each state once, in place if donated.

  Arguments and results are those of `step.residual_attention_step`.
  """
  from rla_jax.kernels.residual.gpu import step as step_module

  return step_module.residual_attention_step(
    q_BGK, k_BGK, v_BHV, log_decay_BH, beta_BH, gamma_BH, base_BHKV, residual_BHKV,
    update=update, clip=clip, readout=readout, interpret=interpret,
  )  # fmt: skip
