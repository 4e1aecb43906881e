"""From a canonical call to a kernel package, which knows nothing of this one."""

import functools
import importlib

import jax

from rla_jax.ops import reference
from rla_jax.ops.inputs import Inputs, Options
from rla_jax.ops.state import ResidualState
from rla_jax.shapes import Array, Values


def unsupported(package: str, inputs: Inputs, options: Options) -> str | None:
  """What the kernel package says of the call."""
  return importlib.import_module(package).unsupported(
    update=options.update,
    key_dim=inputs.k.shape[-1],
    value_dim=inputs.v.shape[-1],
    dtype=inputs.v.dtype,
    channel_decay=inputs.log_decay.ndim == inputs.v.ndim,  # with or without a time axis
    readout=options.readout,
    residual=inputs.gamma is not None,
  )


def run(package: str, inputs: Inputs, options: Options) -> tuple[Values, ResidualState]:
  """Runs the kernels; returns o [B, T, H, V] and the final state."""
  o_BTHV, base_BHKV, residual_BHKV = importlib.import_module(package).residual_attention(
    *_arrays(inputs),
    inputs.segments,
    update=options.update,
    clip=options.clip,
    readout=options.readout,
    chunk_size=options.chunk_size,
  )
  return o_BTHV, ResidualState(base_BHKV, residual_BHKV)


def run_step(package: str, inputs: Inputs, options: Options) -> tuple[Array, ResidualState]:
  """Runs the decode kernel for one token; returns o [B, H, V] and the new state."""
  return _step(package, options, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _step(package, options, inputs):
  o_BHV, base_BHKV, residual_BHKV = importlib.import_module(package).residual_attention_step(
    *_arrays(inputs), update=options.update, clip=options.clip, readout=options.readout
  )
  return o_BHV, ResidualState(base_BHKV, residual_BHKV)


def _step_forward(package, options, inputs):
  return _step(package, options, inputs), inputs


def _step_backward(package, options, inputs, cotangents):
  """The gradient of one token is that of its definition."""
  del package
  _, transpose = jax.vjp(functools.partial(reference.run_step, options=options), inputs)
  return transpose(cotangents)


_step.defvjp(_step_forward, _step_backward)


def _arrays(inputs: Inputs):
  """What both kernel functions take first, in their order."""
  gates = inputs.log_decay, inputs.beta, inputs.gamma
  return inputs.q, inputs.k, inputs.v, *gates, inputs.state.base, inputs.state.residual
