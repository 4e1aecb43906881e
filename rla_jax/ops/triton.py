"""implementation="triton": the fused GPU kernels, behind the interface of the plain forms."""

import dataclasses
import importlib.util

from rla_jax.ops import kernel_call
from rla_jax.ops.dispatch import current_platform
from rla_jax.ops.inputs import Inputs, Options

PACKAGE = 'rla_jax.kernels.residual.gpu'


def unsupported(inputs: Inputs, options: Options) -> str | None:
  """Reason why the kernels cannot serve the call, or None."""
  platform = current_platform()
  if platform not in ('gpu', 'cuda'):
    return f'the Triton kernels run on NVIDIA GPUs; the platform is {platform!r}'
  if importlib.util.find_spec('jax_triton') is None:
    return "jax-triton is not installed (pip install -e '.[cuda]')"
  if inputs.v.ndim == 3:  # one token: the decode kernel has both read-outs
    options = dataclasses.replace(options, readout='gated')
  return kernel_call.unsupported(PACKAGE, inputs, options)


def run(inputs: Inputs, options: Options):
  """Calls the kernels. Returns o [B, T, H, V] and the final state."""
  return kernel_call.run(PACKAGE, inputs, options)


def run_step(inputs: Inputs, options: Options):
  """Calls the decode kernel for one token. Returns o [B, H, V] and the new state."""
  return kernel_call.run_step(PACKAGE, inputs, options)
