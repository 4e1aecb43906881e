"""implementation="pallas": the fused TPU kernels, behind the interface of the plain forms."""

from rla_jax.ops import kernel_call
from rla_jax.ops.dispatch import current_platform
from rla_jax.ops.inputs import Inputs, Options

PACKAGE = 'rla_jax.kernels.residual.tpu'


def unsupported(inputs: Inputs, options: Options) -> str | None:
  """Reason why the kernels cannot serve the call, or None."""
  platform = current_platform()
  if platform != 'tpu':
    return f'the Pallas kernels run on TPUs; the platform is {platform!r}'
  return kernel_call.unsupported(PACKAGE, inputs, options)


def run(inputs: Inputs, options: Options):
  """Calls the kernels. Returns o [B, T, H, V] and the final state."""
  return kernel_call.run(PACKAGE, inputs, options)


def run_step(inputs: Inputs, options: Options):
  """Calls the decode kernel for one token. Returns o [B, H, V] and the new state."""
  return kernel_call.run_step(PACKAGE, inputs, options)
