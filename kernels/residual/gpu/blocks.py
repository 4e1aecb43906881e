"""Block sizes of the Triton kernels: a frozen record, a heuristic, and a tuned table per card."""

import dataclasses
import functools
import json
import pathlib

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Launch of one kernel: value columns of a tile, warps of a program, depth of its pipeline."""

  value: int
  warps: int
  stages: int


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Block sizes of one call.

  Attributes:
    chunk: tokens of a chunk, a power of two from 16 to 64.
    prepare: launch of kernel A (its value tile is not used).
    forward: launch of kernel B.
    sweep: launch of the sequential part of the backward pass.
    gradients: launch of the parallel part.
    pieces: parts of the sequence that the backward pass handles one after the other: more pieces
      hold less memory.
  """

  chunk: int
  prepare: Kernel
  forward: Kernel
  sweep: Kernel
  gradients: Kernel
  pieces: int

  @classmethod
  def from_json(cls, record: dict) -> 'Blocks':
    """Reads what `dataclasses.asdict` wrote."""
    kernels = {n: Kernel(**x) for n, x in record.items() if isinstance(x, dict)}
    return cls(**(record | kernels))


def heuristic(
  *, delta: bool, residual: bool, key_dim: int, value_dim: int, dtype, heads: int, length: int
) -> Blocks:
  """Block sizes for a call of `heads` (batch times heads) sequences of `length` tokens."""
  wide = jnp.dtype(dtype).itemsize == 4
  key_block = max(16, 1 << (key_dim - 1).bit_length())
  chunk = 32 if wide or key_block > 128 else 64
  tile = max(16, min(64, 1 << (value_dim - 1).bit_length()))
  if wide or key_block > 128:
    tile = min(tile, 32)
  while tile > 16 and heads * -(-value_dim // tile) < 120:
    tile //= 2
  warps = 8 if key_block > 128 else 4
  loop = Kernel(tile, warps, 1 if wide else 2)
  pieces = 8 if length >= 2048 else 1
  return Blocks(
    chunk, Kernel(0, 4, 1), loop, loop, Kernel(16 if wide else 64, 8, 1), pieces
  )


@functools.cache
def _tuned(device: str) -> dict:
  path = pathlib.Path(__file__).parent / 'tuned' / f'{device}.json'
  return json.loads(path.read_text()) if path.exists() else {}


def tuned_key(
  *, delta: bool, residual: bool, key_dim: int, value_dim: int, dtype, heads: int, length: int
) -> str:
  """Name of a call in the tuned tables; heads and length rounded down to powers of two."""
  rule = ('delta' if delta else 'additive') + ('_residual' if residual else '')
  heads, length = 1 << (heads.bit_length() - 1), 1 << (length.bit_length() - 1)
  return f'{rule}/{jnp.dtype(dtype).name}/K{key_dim}/V{value_dim}/heads{heads}/length{length}'


def choose(device_kind: str | None, **call) -> Blocks:
  """The tuned block sizes of a call if the card's table has them, else the heuristic's."""
  device = (device_kind or '').lower().replace('nvidia', '').strip().replace(' ', '_')
  record = _tuned(device).get(tuned_key(**call))
  return Blocks.from_json(record) if record else heuristic(**call)
