"""Whether a training step fits the devices of a mesh, what bounds its time, and which one fits.

All is read from the step compiled for these devices, attached or only described. The bound on the
time is a lower one: products at the peak rate, communication at that of all links, the larger of
the two as if they overlapped.
"""

import dataclasses
import itertools
import math
import re

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rla_jax import sharding
from rla_jax.models import LanguageModel, ModelConfig
from rla_jax.training import ahead_of_time, hlo
from rla_jax.training.config import model_config, settled
from rla_jax.training.errors import ConfigError
from rla_jax.training.flops import has_triton, matmul_flops
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.state import initializer
from rla_jax.training.utilisation import Peak, peak_of, recurrence_flops, training_flops

_KINDS = 'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute'
# Share of a communication's larger side that crosses a chip's links: a ring of many devices.
_CROSSINGS = {'all-reduce': 2.0}


@dataclasses.dataclass(frozen=True)
class Fit:
  """What the compiler says of a step, on each device.

  Attributes:
    mesh: sizes of the axes.
    accumulate: parts that a batch is cut into.
    resident: bytes of the state and the batch.
    needed: bytes at most, all together.
    flops: of matrix products, recomputation included. Those in Triton kernels cannot be seen; they
      count as `unseen`.
    unseen: what the recurrences need, if Triton kernels work them out: such a kernel needs more.
    model_flops: those that MFU counts.
    communication: {kind: (how often, bytes together)}; None if the step does not compile.
    peak: of the device.
  """

  mesh: dict[str, int]
  accumulate: int
  resident: int
  needed: int
  flops: float
  unseen: float
  model_flops: float
  communication: dict[str, tuple[int, int]] | None
  peak: Peak

  @property
  def fits(self) -> bool:
    """Whether the memory is enough."""
    return self.communication is not None and self.needed <= self.peak.memory

  @property
  def compute_seconds(self) -> float:
    """Time of the products at the peak rate."""
    return self.flops / self.peak.flops

  @property
  def link_seconds(self) -> float:
    """Time of the communication at the rate of all links together."""
    sizes = self.communication or {}
    crossed = sum(_CROSSINGS.get(kind, 1.0) * size for kind, (_, size) in sizes.items())
    return crossed / self.peak.link_rate

  @property
  def seconds(self) -> float:
    """A step takes at least this long."""
    return max(self.compute_seconds, self.link_seconds)

  @property
  def mfu(self) -> float:
    """No more than this is possible."""
    return self.model_flops / self.peak.flops / self.seconds

  @property
  def row(self) -> dict[str, object]:
    """Plain numbers for a table: GB are 2^30 bytes, all on one device and for one step."""
    sizes = {kind: size for kind, (_, size) in (self.communication or {}).items()}
    kinds = {kind.replace('-', '_') + '_gb': sizes.get(kind, 0) / 2**30 for kind in _KINDS}
    return {
      **self.mesh,
      'accumulate': self.accumulate,
      'memory_gb': self.needed / 2**30,
      'of_gb': self.peak.memory / 2**30,
      'state_gb': self.resident / 2**30,
      'tflop': self.flops / 1e12,
      'model_tflop': self.model_flops / 1e12,
      **kinds,
      'fits': self.fits,
      'products_seconds': self.compute_seconds,
      'links_seconds': self.link_seconds,
      'bound_seconds': self.seconds,
      'mfu_bound': self.mfu,
    }

  def __str__(self):
    rows = [
      ('mesh', ', '.join(f'{axis} {size}' for axis, size in self.mesh.items())
       + f'; accumulate {self.accumulate}'),
      ('memory', f'{_gib(self.needed)} a device of {_gib(self.peak.memory)}, '
                 f'{_gib(self.resident)} of it state and batch'),
    ]  # fmt: skip
    if self.communication is None:
      return _lines([*rows, ('', 'the compiler refuses it: it does not fit')])
    rows.append(('products', f'{self.flops / 1e12:,.2f} TFLOP a device and step, '
                             f'{self.model_flops / 1e12:,.2f} of the model'))  # fmt: skip
    if self.unseen:
      rows.append(('', f'in Triton kernels at least {self.unseen / 1e12:,.2f} of them'))
    for kind, (times, size) in sorted(self.communication.items()):
      rows.append((kind, f'{times:,} times, {_gib(size)} together'))
    rows.append(('bound', f'{self.seconds:.3f} s a step: products {self.compute_seconds:.3f} s, '
                          f'links {self.link_seconds:.3f} s; MFU at most {100 * self.mfu:.0f} %'))
    return _lines(rows)


def measure(config: ConfigDict, mesh: Mesh, peak: Peak | None = None) -> Fit:
  """Compiles the training step of a config for a mesh.

  Args:
    config: the whole config; of its section `mesh` nothing is read.
    mesh: from `sharding.make_mesh`.
    peak: of its devices; None: by their kind.

  Raises:
    ConfigError: rates of the devices that are not known, arrays that the mesh does not divide.
  """
  config, device = settled(config, mesh), mesh.devices.flat[0]
  peak = peak or peak_of(device)
  if peak is None:
    raise ConfigError(
      f'the peak rates of {device.device_kind!r} are not known: expected a TPU or GPU of '
      'rla_jax/training/utilisation.py, where others can be added'
    )
  try:
    traced = ahead_of_time.trace_training_step(config, mesh)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  tokens = config.data.batch_size * config.data.seq_len
  model_flops = tokens * training_flops(_model(config), config.data.seq_len)
  unseen = 3 * tokens * recurrence_flops(_model(config)) if has_triton(traced.jaxpr) else 0.0
  found = {
    'mesh': dict(mesh.shape), 'accumulate': config.accumulate, 'peak': peak,
    'flops': (matmul_flops(traced.jaxpr) + unseen) / mesh.size, 'unseen': unseen / mesh.size,
    'model_flops': model_flops / mesh.size,
    'resident': _resident(config, mesh, _state(config)),
  }  # fmt: skip
  try:
    compiled = ahead_of_time.lower(traced, mesh).compile()
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r'Used ([\d.]+)([KMG]) of', str(error))
    if used is None:
      raise
    needed = round(float(used[1]) * {'K': 2**10, 'M': 2**20, 'G': 2**30}[used[2]])
    return Fit(**found, needed=needed, communication=None)
  communication = {}
  for one in hlo.collectives(compiled.as_text()):
    times, size = communication.get(one.op, (0, 0))
    communication[one.op] = times + (one.times or 1), size + (one.times or 1) * one.bytes
  return Fit(**found, needed=ahead_of_time.memory(compiled), communication=communication)


def nearest(config: ConfigDict, devices, failed: Fit, tries: int = 4) -> Fit | None:
  """The layout that fits and differs least from one that does not: mesh sizes and accumulate.

  Layouts are ordered by the number of halvings and doublings, left out if an estimate says that
  they do not fit either, and compiled one after the other.

  Args:
    config: the whole config.
    devices: those of the mesh.
    failed: what `measure` says of the layout that does not fit.
    tries: layouts that are compiled at most.
  """
  config = config.copy_and_resolve_references()
  size = len(devices)
  powers = [2**i for i in range(size.bit_length()) if size % 2**i == 0]
  layouts, state = [], _state(config)
  for sizes in itertools.product(powers, repeat=4):
    if math.prod(sizes) != size:
      continue
    for more in (1, 2, 4, 8):
      mesh = dict(zip(sharding.AXES, sizes, strict=True))
      layouts.append((_distance(mesh, failed) + math.log2(more), more, mesh))
  for distance, more, sizes in sorted(layouts, key=lambda x: x[:2]):
    config.accumulate = failed.accumulate * more
    rows = sizes['data'] * sizes['fsdp'] * config.accumulate
    if distance == 0 or config.data.batch_size % rows or config.data.seq_len % sizes['seq']:
      continue
    mesh = sharding.make_mesh(**sizes, devices=devices)
    try:
      if _estimate(config, mesh, state, failed) > 0.95 * failed.peak.memory:
        continue
      fit = measure(config, mesh, failed.peak)
    except (ConfigError, ValueError):
      continue  # The mesh does not divide an array.
    if fit.fits:
      return fit
    tries -= 1
    if not tries:
      break
  return None


def _model(config: ConfigDict) -> ModelConfig:
  return model_config(config, config.model.vocab_size)


def _state(config: ConfigDict):
  """Shapes and dtypes of the training state."""
  init = initializer(LanguageModel(_model(config)), make_optimizer(config), config)
  return jax.eval_shape(init, jax.random.key(0))


def _resident(config: ConfigDict, mesh: Mesh, state) -> int:
  """Bytes of a state and of a batch on each device."""
  batch = ahead_of_time.abstract_batch(config, mesh)
  placed = sharding.shardings(state, mesh), jax.tree.map(lambda x: x.sharding, batch)
  return sum(
    math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    for x, s in zip(*map(jax.tree.leaves, ((state, batch), placed)), strict=True)
  )


def _estimate(config: ConfigDict, mesh: Mesh, state, failed: Fit) -> float:
  """Bytes a device: the state as it is split here, the rest as the tokens of one part."""

  def tokens(sizes, accumulate):
    return 1 / (sizes['data'] * sizes['fsdp'] * sizes['seq'] * accumulate)

  rest = failed.needed - failed.resident
  share = tokens(mesh.shape, config.accumulate) / tokens(failed.mesh, failed.accumulate)
  return _resident(config, mesh, state) + rest * share


def _distance(mesh: dict[str, int], failed: Fit) -> float:
  return sum(abs(math.log2(mesh[axis] / failed.mesh[axis])) for axis in sharding.AXES)


def _gib(size: float) -> str:
  return f'{size / 2**30:,.2f} GiB'


def _lines(rows) -> str:
  return '\n'.join(f'{name:<20}{text}' for name, text in rows)
