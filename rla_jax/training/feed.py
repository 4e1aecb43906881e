"""Batches on their way to the devices: the rows that a process reads, and the next ones ahead."""

import collections
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from rla_jax.sharding import batch_sharding
from rla_jax.training.errors import ConfigError


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Puts this process's rows [B / shares, T] on its devices; together they are [B, T]."""
  rows, length = next(iter(batch.values())).shape
  blocks, shares = _blocks(mesh)
  shape = rows * shares, length
  size = rows // len(blocks)
  place = batch_sharding(mesh)

  def put(x):
    def part(index):
      start = index[0].indices(shape[0])[0]
      local = blocks.index(start // size) * size
      return x[local : local + size, index[1]]

    return jax.make_array_from_callback(shape, place, part)

  return {name: put(x) for name, x in batch.items()}


def share(mesh: Mesh) -> dict[str, int]:
  """Which part of each batch this process reads, as keyword arguments of `rla_jax.data`.

  Processes that hold other tokens or copies of the same rows read the same part.

  Raises:
    ConfigError: the rows of two processes overlap in part.
  """
  everyone = _rows_by_process(mesh)
  parts = sorted(set(everyone.values()))
  if sum(map(len, parts)) != len(set().union(*parts)) or len(set(map(len, parts))) > 1:
    raise ConfigError(
      f'mesh {dict(mesh.shape)} gives processes rows that overlap in part: {parts}; '
      'expected data * fsdp to be a multiple or a divisor of the number of processes'
    )
  return {
    'process_index': parts.index(everyone[jax.process_index()]), 'process_count': len(parts)
  }  # fmt: skip


def ahead(
  batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, count: int = 2
) -> Iterator[dict[str, jax.Array]]:
  """Batches on the devices, so many of them on their way while the one before is at work."""
  waiting = collections.deque()
  for batch in batches:
    waiting.append(to_devices(batch, mesh))
    if len(waiting) == count:
      yield waiting.popleft()
  yield from waiting


def _blocks(mesh: Mesh) -> tuple[tuple[int, ...], int]:
  """The blocks of rows that this process holds, in order, and the number of different shares."""
  everyone = _rows_by_process(mesh)
  return everyone[jax.process_index()], len(set(everyone.values()))


@functools.lru_cache
def _rows_by_process(mesh: Mesh) -> dict[int, tuple[int, ...]]:
  """For every process the blocks of rows that its devices hold, counted along data and fsdp."""
  places = mesh.shape['data'] * mesh.shape['fsdp']
  found = {}
  for block, devices in enumerate(mesh.devices.reshape(places, -1)):
    for device in devices:
      found.setdefault(device.process_index, set()).add(block)
  return {process: tuple(sorted(blocks)) for process, blocks in found.items()}
