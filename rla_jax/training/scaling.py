"""Tokens a second of the training step on a mesh of attached devices, without data and loop.

The rows for each place of data and fsdp are given: along these axes a device's work stays the same,
along seq and tensor the batch does. Either way n devices are at best n times as fast as one.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rla_jax.models import LanguageModel
from rla_jax.sharding import AXES
from rla_jax.training import ahead_of_time
from rla_jax.training.config import model_config, settled
from rla_jax.training.feed import to_devices
from rla_jax.training.flops import has_triton
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.state import abstract_state, create_state
from rla_jax.training.utilisation import peak_of, training_flops


@dataclasses.dataclass(frozen=True)
class Speed:
  """Of a training step.

  Attributes:
    rows: of a batch.
    accumulate: parts that it is cut into.
    seconds: a step, the median over the rounds.
    tokens_per_second: on all devices together.
    mfu: by the formula of `utilisation.py`; None: the devices' peak rate is not known.
    memory: bytes that the step needs on each device.
    triton: whether Triton kernels work out the recurrences.
  """

  rows: int
  accumulate: int
  seconds: float
  tokens_per_second: float
  mfu: float | None
  memory: int
  triton: bool


def measure(
  config: ConfigDict, mesh: Mesh, rows: int, steps: int = 10, rounds: int = 3
) -> Speed | None:
  """Compiles the training step for a mesh, and calls it on random tokens; a row is one document.

  Args:
    config: the whole config, with the size of the vocabulary; mesh and batch size are not read.
    mesh: from `sharding.make_mesh`, of attached devices.
    rows: for each place of data and fsdp.
    steps: of a round, of which there is one more to warm up.
    rounds: that are timed.

  Returns:
    What was measured; None if the step does not fit the devices.

  Raises:
    ValueError: the mesh does not divide an array.
  """
  config = config.copy_and_resolve_references()
  config.data.batch_size = rows * mesh.shape['data'] * mesh.shape['fsdp']
  config = settled(config, mesh)
  try:
    times, memory, triton = _times(config, mesh, steps, rounds)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None
  seconds = statistics.median(times)
  tokens, peak = config.data.batch_size * config.data.seq_len, peak_of(mesh.devices.flat[0])
  mfu = None
  if peak is not None:
    model = model_config(config, config.model.vocab_size)
    work = tokens * training_flops(model, config.data.seq_len)
    mfu = work / (seconds * mesh.size * peak.flops)
  return Speed(
    config.data.batch_size, config.accumulate, seconds, tokens / seconds, mfu, memory, triton
  )


def table(rows: Iterable[dict[str, object]]) -> str:
  """The rows of `experiments/scaling.py` in Markdown, one line each, in their order.

  Args:
    rows: as `rla_jax.evaluation.results.read_rows` reads them.
  """
  lines = [
    '| rows x tokens | devices | overrides | ms a step | tokens/s | MFU | GiB a device | '
    'efficiency | commit |',
    '|---|---|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    axes = ', '.join(f'{axis} {row[axis]}' for axis in AXES if row[axis] > 1) or '1'
    overrides = (row['overrides'] or '').replace('model.', '')
    cells = [f'{row["rows_a_place"]} x {row["length"]:,}', axes, overrides]
    if row['tokens_per_second'] is None:
      cells += ['does not fit', *4 * ['']]
    else:
      cells += [f'{1e3 * row["step_seconds"]:,.0f}', f'{row["tokens_per_second"]:,.0f}',
                *(_percent(row['mfu']), f'{row["memory_gb"]:.1f}', _percent(row['efficiency']))]
    lines.append(f'| {" | ".join([*cells, row["commit"]])} |')
  return '\n'.join(lines)


def _percent(value: float | None) -> str:
  return '' if value is None else f'{100 * value:.1f} %'


def _times(config, mesh, steps, rounds):
  """Seconds a step in each round, the bytes that a step needs, whether it has Triton kernels."""
  traced = ahead_of_time.trace_training_step(config, mesh)
  compiled = ahead_of_time.lower(traced, mesh).compile()
  batch = _random_batch(config, mesh)
  with jax.set_mesh(mesh):
    model = LanguageModel(model_config(config, config.model.vocab_size))
    optimizer = make_optimizer(config)
    abstract = abstract_state(model, optimizer, mesh, config)
    state = create_state(model, optimizer, abstract, config.seed, config)
  times = []
  for _ in range(1 + rounds):
    begin = time.perf_counter()
    for _ in range(steps):
      state, result = compiled(state, batch)
    jax.block_until_ready(result)
    times.append((time.perf_counter() - begin) / steps)
  return times[1:], ahead_of_time.memory(compiled), has_triton(traced.jaxpr)


def _random_batch(config, mesh):
  shape = config.data.batch_size, config.data.seq_len
  tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
  return to_devices({
    'tokens': tokens, 'targets': np.roll(tokens, -1, axis=1),
    'segment_ids': np.zeros(shape, np.int32), 'loss_mask': np.ones(shape, np.float32),
  }, mesh)  # fmt: skip
