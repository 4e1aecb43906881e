"""Block sizes of the TPU kernels, and how blocks lie in the arrays."""

import dataclasses

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rla_jax.kernels.residual.tpu import tokens

LANES = 128


# What one grid step of the largest kernel may take of a core's vector memory.
VMEM_LIMIT = 56 * 2**20
CHUNKS = (64, 128)


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes of a grid step.

  Attributes:
    chunk: tokens of a chunk, 8 times a power of two. Compiled kernels take 64 or 128.
    chunks: chunks of a grid step, walked by a loop inside it. Fewer where the sequence is short.
    heads: most value heads of a grid step, interleaved to hide the matrix unit's latency; fewer
      where the heads are few or large.
    vmem: bytes of vector memory that a grid step may take, the pipeline's second buffers included.
  """

  chunk: int = 64
  chunks: int = 4
  heads: int = 8
  vmem: int = VMEM_LIMIT


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is computed.

  Attributes:
    delta: erase before write (delta rule), else additive.
    residual: carry the residual state.
    gated: the paper's read-out, else the sum of both states' read-outs.
    clip: bound of the residual, or None.
  """

  delta: bool
  residual: bool
  gated: bool
  clip: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
  """One grid step's share of padded arrays [B, T, heads * size]; everything here is static.

  Attributes:
    rule: what is computed.
    chunk, chunks, heads, vmem: as `Blocks`, with the heads of a block.
    group: value heads of a key head.
    key_dim, value_dim: padded sizes of a head.
    interpret: False, True or pltpu.InterpretParams.
  """

  rule: Rule
  chunk: int
  chunks: int
  heads: int
  group: int
  key_dim: int
  value_dim: int
  vmem: int = VMEM_LIMIT
  interpret: bool | pltpu.InterpretParams = False

  @property
  def keys(self):
    """Key heads of a grid step."""
    return max(1, self.heads // self.group)

  def tokens_of(self, n):
    """Tokens of chunk n of a block."""
    return pl.ds(pl.multiple_of(n * self.chunk, self.chunk), self.chunk)

  def keys_of(self, h):
    """Lanes of value head h's query and key head."""
    g = h // self.group
    return slice(g * self.key_dim, (g + 1) * self.key_dim)

  def values_of(self, h):
    """Lanes of value head h."""
    return slice(h * self.value_dim, (h + 1) * self.value_dim)

  def grid(self, v_BTF):
    """(batch, head blocks, token blocks)."""
    batch, time, features = v_BTF.shape
    return batch, features // (self.heads * self.value_dim), time // (self.chunk * self.chunks)

  def specs(self, blocks: int | None = None):
    """BlockSpecs by kind: key, value, rows, inverse, state, states, partial.

    Args:
      blocks: number of token blocks if they are walked backwards, else None.
    """
    width = self.chunk * self.chunks
    turn = (lambda n: n) if blocks is None else (lambda n: blocks - 1 - n)
    # Several head blocks may share a key head.
    def key_block(j):
      return j * self.heads // (self.group * self.keys)
    spec = pl.BlockSpec
    def per_chunk(rows, lanes):
      return spec(
          (1, self.heads, self.chunks, rows, lanes), lambda b, j, n: (b, j, turn(n), 0, 0)
        )
    return {
      'key': spec((1, width, self.keys * self.key_dim), lambda b, j, n: (b, turn(n), key_block(j))),
      'value': spec((1, width, self.heads * self.value_dim), lambda b, j, n: (b, turn(n), j)),
      'partial': spec((1, width, self.keys * self.key_dim), lambda b, j, n: (b, turn(n), j)),
      'rows': per_chunk(tokens.ROWS, self.chunk),
      'inverse': per_chunk(self.chunk, 2 * self.chunk),
      'states': per_chunk(self.key_dim, self.value_dim),
      'state': spec((1, self.heads, self.key_dim, self.value_dim), lambda b, j, n: (b, j, 0, 0)),
    }

  def params(self, *, sequential: bool):
    """Keyword arguments of pallas_call that all kernels share."""
    last = 'arbitrary' if sequential else 'parallel'
    compiler = pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', last), vmem_limit_bytes=self.vmem
    )
    return {'compiler_params': compiler, 'interpret': self.interpret}


def struct(shape, dtype, *like):
  """Shape of a kernel's output, varying over the mesh axes over which the inputs vary."""
  kinds = [jax.typeof(x).manual_axis_type for x in like]
  varying = frozenset().union(*(kind.varying for kind in kinds))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kinds[0].update(varying=varying))


def heuristic(chunk_size: int | None, interpret) -> Blocks:
  """Block sizes for the TPU that the program is traced for.

  Chunks of 64: counted in rows that pass a matrix unit of 128, the products of the delta rule come
  to 14 a token at 64 as at 128, while the triangular systems are half as large. Generations differ
  in vector memory, which decides the heads of a grid step: a v4 core has an eighth of v5e's.

  Raises:
    ValueError: `chunk_size` is none that the kernels have.
  """
  allowed = CHUNKS if interpret is False else (8, 16, 32, *CHUNKS)
  if chunk_size is not None and chunk_size not in allowed:
    raise ValueError(f'chunk_size {chunk_size}: the TPU kernels take {allowed}')
  chunk = chunk_size or CHUNKS[0]
  if interpret is not False:
    return Blocks(chunk=chunk)
  core = pltpu.get_tpu_info()
  return Blocks(chunk=chunk, vmem=min(VMEM_LIMIT, core.vmem_capacity_bytes * 7 // 8))


def choose(
  blocks: Blocks, *, time: int, heads: int, keys: int, key_dim: int, value_dim: int, itemsize: int
) -> tuple[int, int, int, int]:
  """(chunks, heads of a grid step, padded key size, padded value size).

  Heads lie side by side in the lanes, so a block of heads must fill whole registers of 128 lanes or
  be all there are; heads of 64 do so two at a time, other sizes are padded. Fewer heads, then fewer
  chunks, where a grid step would not fit in vector memory.
  """
  group = heads // keys
  for chunks in range(min(blocks.chunks, pl.cdiv(time, blocks.chunk)), 0, -1):
    for unit in (64, LANES):
      def pad(size, unit=unit):
        return unit if size <= unit else pl.cdiv(size, LANES) * LANES
      k, v = pad(key_dim), pad(value_dim)
      for h in range(min(blocks.heads, heads), 0, -1):
        g = max(1, h // group)
        shares = heads % h == 0 and (h % group == 0 or group % h == 0)
        fills = (h * v % LANES == 0 or h == heads) and (g * k % LANES == 0 or g == keys)
        small = h * grid_step_bytes(blocks.chunk, chunks, k, v, itemsize) <= blocks.vmem
        if shares and fills and small:
          return chunks, h, k, v
  raise AssertionError('one chunk of one head of whole registers always fits')


def grid_step_bytes(chunk: int, chunks: int, key_dim: int, value_dim: int, itemsize: int) -> int:
  """Vector memory a head of the backward kernel takes, which is the largest."""
  key, value = max(key_dim, LANES), max(value_dim, LANES)
  width = chunk * chunks
  streams = width * (4 * key + 5 * value + 2 * 2 * LANES) * itemsize
  states = 2 * chunks * key * value * itemsize + 4 * key * value * 4
  scalars = 2 * chunks * tokens.ROWS * LANES * 4
  live = 24 * chunk * max(key, value, 2 * chunk) * 4 + 2 * key * value * 4
  return 2 * (streams + states + scalars) + live
