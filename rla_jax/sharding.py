"""The device mesh, and which axis of it splits which axis of a parameter: a table, outside modules.

Mesh axes: `data` copies the model, `fsdp` splits parameters (and rows), `seq` splits the sequence,
`tensor` splits heads and hidden units. Axes are `AxisType.Auto`: XLA places the communication.
"""

import math
import re
from collections.abc import Sequence

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('data', 'fsdp', 'seq', 'tensor')
BATCH = PartitionSpec(('data', 'fsdp'), 'seq')  # of arrays [B, T]

# Regular expression of a path's end -> axes of the array's last dimensions; the first match counts.
# Leading dimensions that a rule does not name, such as that of scanned layers, are not split.
P = PartitionSpec
RULES: tuple[tuple[str, PartitionSpec], ...] = (
  (r'embedding$', P('tensor', 'fsdp')),  # [S, D]
  (r'head$', P('fsdp', 'tensor')),  # [D, S]
  (r'(decay|output_gate)_down_proj$', P('fsdp', None)),  # [D, rank]
  (r'(decay|output_gate)_up_proj$', P(None, 'tensor')),  # [rank, H K]
  (r'(o|down)_proj$', P('tensor', 'fsdp')),  # [H V, D], [F, D]
  (r'_proj$', P('fsdp', 'tensor')),  # [D, H K], [D, H], [D, F]
  (r'_conv$', P(None, 'tensor')),  # [W, H K]
  (r'(scale|A_log|dt_bias)$', P()),  # vectors, and numbers a head
)

# An array with more elements than this must have a rule: a copy a device would waste its memory.
SMALL = 2**16


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  seq: int = 1,
  tensor: int = 1,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """Arranges devices in a mesh with axes data, fsdp, seq, tensor.

  Args:
    data: devices along the axis; -1, for one axis at most: all that are left.
    fsdp: likewise.
    seq: likewise.
    tensor: likewise.
    devices: the devices; None: all.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, seq, tensor]
  asked = ', '.join(f'{axis} {size}' for axis, size in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ValueError(f'mesh is {asked}; expected sizes of at least 1, or -1 for one of them')
  known = math.prod(size for size in sizes if size != -1)
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  if math.prod(sizes) != len(devices):
    needed = f'a multiple of {known}' if -1 in (data, fsdp, seq, tensor) else known
    raise ValueError(
      f'mesh is {asked}, which does not fill {len(devices)} devices; expected {needed} of them'
    )
  types = (AxisType.Auto,) * len(AXES)
  try:
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
  except NotImplementedError:  # No axis of a TPU's torus, nor several, has the size of one of ours.
    parts = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(parts, AXES, axis_types=types)


def spec_of(
  path: str,
  shape: Sequence[int],
  mesh: Mesh | AbstractMesh,
  rules: Sequence[tuple[str, PartitionSpec]] = RULES,
) -> PartitionSpec:
  """How the array at a path is split.

  Args:
    path: as in `params/layers/mixer/query/kernel`; rules are searched in it.
    shape: the array's shape; dimensions that a rule does not name are not split.
    mesh: the mesh whose axes the rules name.
    rules: the table.

  Raises:
    ValueError: a large array without rule, or a dimension that its mesh axes do not divide.
  """
  rule = next(((pattern, spec) for pattern, spec in rules if re.search(pattern, path)), None)
  if rule is None:
    if math.prod(shape) > SMALL:
      raise ValueError(
        f'no sharding rule for {path}, shape {tuple(shape)}: '
        'arrays of this size need one in rla_jax/sharding.py'
      )
    return PartitionSpec()
  pattern, spec = rule
  if len(spec) > len(shape):
    raise ValueError(f'sharding rule {pattern!r} names {len(spec)} axes, {path} has {len(shape)}')
  spec = PartitionSpec(*[None] * (len(shape) - len(spec)), *spec)
  for size, axes in zip(shape, spec, strict=True):
    parts = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
    if size % parts:
      raise ValueError(f'{path}, shape {tuple(shape)}: mesh axis {axes} of size {parts} does not '
                       f'divide {size}')  # fmt: skip
  return spec


def shardings(tree, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = RULES):
  """Shardings of a tree of arrays or shapes, by the table.

  Optimiser states hold copies of the parameters under the same names, so they are split alike.

  Raises:
    ValueError: see `spec_of`.
  """

  def sharding(path, x):
    return NamedSharding(mesh, spec_of(_name(path), x.shape, mesh, rules))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def as_stored(tree):
  """Parameters or their gradients, to lie as the table says; without a mesh, the tree itself.

  A sum over devices of which each is to keep a part is then scattered, not copied to all.
  """
  mesh = in_force()
  if mesh is None:
    return tree
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jax.lax.with_sharding_constraint(x, spec_of(_name(path), x.shape, mesh)), tree
  )


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays [B, T]: rows over data and fsdp, tokens over seq."""
  return NamedSharding(mesh, BATCH)


def in_force() -> AbstractMesh | None:
  """The mesh of `jax.set_mesh`, if it has several devices along `AXES` that XLA places work on.

  None inside `shard_map`: there the caller has placed it.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or not set(AXES) <= set(mesh.axis_names) or mesh.size == 1:
    return None
  auto = all(kind == AxisType.Auto for kind in mesh.axis_types)
  return mesh if auto else None


def rows_of(mesh: Mesh | AbstractMesh, rows: int) -> tuple[str, ...] | None:
  """The axes that split so many rows; None if they do not divide them, as for a single row."""
  axes = BATCH[0]
  return axes if rows % math.prod(mesh.shape[axis] for axis in axes) == 0 else None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """x [B, T, ...] with rows over data and fsdp, and the other dimensions as told.

  Without a mesh, x itself. XLA then does not gather activations to suit how a parameter lies.

  Args:
    x: activations.
    *axes: mesh axis of each dimension after the first, or None.
  """
  mesh = in_force()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, P(rows_of(mesh, x.shape[0]), *axes))


def gathered(parameter: jax.Array, *axes: str | None) -> jax.Array:
  """A parameter as it is used: its parts of the axis fsdp together, split along `axes` only.

  XLA does that by itself for matrix products. For a look-up it would rather gather the tokens of
  all devices, and with them activations.
  """
  mesh = in_force()
  return parameter if mesh is None else jax.lax.with_sharding_constraint(parameter, P(*axes))


def table(tree, shardings) -> str:
  """Lists arrays with shape, dtype, sharding and bytes a device, and the sum of these bytes."""
  rows, total = [], 0
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  for (path, x), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
    size = math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
    total += size
    shape = f'{x.dtype.name}[{",".join(map(str, x.shape))}]'
    axes = ', '.join('-' if axis is None else str(axis) for axis in sharding.spec)
    rows.append((_name(path), shape, axes, f'{size:,}'))
  rows.append(('total', '', '', f'{total:,}'))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join(
    '  '.join(cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
    + f'  {row[3]:>{widths[3]}}'
    for row in rows
  )
