"""implementation="pallas": the fused TPU kernels, behind the interface of the plain forms.

XLA cannot divide a kernel. So under a mesh with the axes of `rla_jax.sharding` every device runs it
in `shard_map` on its own rows and heads. Inside a `shard_map` of the caller nothing is added.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from rla_jax import sharding
from rla_jax.ops import kernel_call
from rla_jax.ops.dispatch import current_platform
from rla_jax.ops.inputs import Inputs, Options
from rla_jax.ops.state import ResidualState

PACKAGE = 'rla_jax.kernels.residual.tpu'


def unsupported(inputs: Inputs, options: Options) -> str | None:
  """Reason why the kernels cannot serve the call, or None."""
  platform = current_platform()
  if platform != 'tpu':
    return f'the Pallas kernels run on TPUs; the platform is {platform!r}'
  return kernel_call.unsupported(PACKAGE, inputs, options) or _undivided(inputs)


def run(inputs: Inputs, options: Options):
  """Calls the kernels. Returns o [B, T, H, V] and the final state."""
  function = functools.partial(kernel_call.run, PACKAGE, options=options)
  return _on_every_device(function, inputs, time=(None,))


def run_step(inputs: Inputs, options: Options):
  """Calls the decode kernel for one token. Returns o [B, H, V] and the new state."""
  function = functools.partial(kernel_call.run_step, PACKAGE, options=options)
  return _on_every_device(function, inputs, time=())


def _undivided(inputs: Inputs) -> str | None:
  """Reason why the mesh in force cannot divide the call, or None."""
  mesh = sharding.in_force()
  if mesh is None:
    return None
  if mesh.shape['seq'] > 1:
    return (
      f'mesh axis seq has {mesh.shape["seq"]} devices, and a kernel needs its whole sequence; use '
      'ops.split_over_sequence in shard_map'
    )
  parts, groups, heads = mesh.shape['tensor'], inputs.k.shape[-2], inputs.v.shape[-2]
  if heads % parts or (groups > 1 and groups % parts):
    return (
      f'mesh axis tensor has {parts} devices, which divide neither evenly {heads} value heads nor '
      f'{groups} key heads; repeat the key heads, or use fewer devices along it'
    )
  return None


def _on_every_device(function: Callable, inputs: Inputs, time: tuple):
  mesh = sharding.in_force()
  if mesh is None:
    return function(inputs=inputs)
  rows = sharding.rows_of(mesh, inputs.v.shape[0])
  tokens = P(rows, *time, 'tensor')
  # One key head for all value heads is on every device.
  keys = tokens if inputs.k.shape[-2] > 1 else P(rows)
  states = P(rows, 'tensor')
  return jax.shard_map(
    lambda inputs: function(inputs=inputs),
    in_specs=(
      Inputs(keys, keys, tokens, tokens, tokens, tokens, ResidualState(states, states), P(rows)),
    ),
    out_specs=(tokens, ResidualState(states, states)),
    check_vma=False,
  )(inputs)
