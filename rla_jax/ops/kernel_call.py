"""From a canonical call to a kernel package, which knows nothing of this one."""

import importlib

from rla_jax.ops.inputs import Inputs, Options
from rla_jax.ops.state import ResidualState
from rla_jax.shapes import Values


def unsupported(package: str, inputs: Inputs, options: Options) -> str | None:
  """What the kernel package says of the call."""
  return importlib.import_module(package).unsupported(
    update=options.update,
    key_dim=inputs.k.shape[-1],
    value_dim=inputs.v.shape[-1],
    dtype=inputs.v.dtype,
    channel_decay=inputs.log_decay.ndim == 4,
    readout=options.readout,
    residual=inputs.gamma is not None,
  )


def run(package: str, inputs: Inputs, options: Options) -> tuple[Values, ResidualState]:
  """Runs the kernels; returns o [B, T, H, V] and the final state."""
  o_BTHV, base_BHKV, residual_BHKV = importlib.import_module(package).residual_attention(
    inputs.q,
    inputs.k,
    inputs.v,
    inputs.log_decay,
    inputs.beta,
    inputs.gamma,
    inputs.state.base,
    inputs.state.residual,
    inputs.segments,
    update=options.update,
    clip=options.clip,
    readout=options.readout,
    chunk_size=options.chunk_size,
  )
  return o_BTHV, ResidualState(base_BHKV, residual_BHKV)
