"""Block sizes of the TPU kernels, and how blocks lie in the arrays."""

import dataclasses

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rla_jax.kernels.residual.tpu import tokens

LANES = 128


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Sizes of a grid step.

  Attributes:
    chunk: tokens of a chunk, 8 times a power of two. Compiled kernels take 64 or 128.
    chunks: chunks of a grid step, walked by a loop inside it. Fewer where the sequence is short.
    heads: value heads of a grid step, interleaved to hide the matrix unit's latency.
  """

  chunk: int = 64
  chunks: int = 4
  heads: int = 2


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
    chunk, chunks, heads: as `Blocks`.
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
    key_block = lambda j: j * self.heads // (self.group * self.keys)
    spec = pl.BlockSpec
    per_chunk = lambda rows, lanes: spec(
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
      dimension_semantics=('parallel', 'parallel', last), vmem_limit_bytes=VMEM_LIMIT
    )
    return dict(compiler_params=compiler, interpret=self.interpret)


VMEM_LIMIT = 64 * 2**20


def struct(shape, dtype, *like):
  """Shape of a kernel's output, varying over the mesh axes over which the inputs vary."""
  kinds = [jax.typeof(x).manual_axis_type for x in like]
  varying = frozenset().union(*(kind.varying for kind in kinds))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kinds[0].update(varying=varying))


def choose(
  blocks: Blocks, *, time: int, heads: int, keys: int, key_dim: int, value_dim: int
) -> tuple[int, int, int, int]:
  """(chunks, heads of a grid step, padded key size, padded value size).

  Heads lie side by side in the lanes, so a block of heads must fill whole registers of 128 lanes or
  be all there are; heads of 64 do so two at a time, other sizes are padded.
  """
  chunks = min(blocks.chunks, pl.cdiv(time, blocks.chunk))
  group = heads // keys
  for unit in (64, LANES):
    k, v = (unit if size <= unit else pl.cdiv(size, LANES) * LANES for size in (key_dim, value_dim))
    for h in range(min(blocks.heads, heads), 0, -1):
      g = max(1, h // group)
      shares = heads % h == 0 and (h % group == 0 or group % h == 0)
      fills = (h * v % LANES == 0 or h == heads) and (g * k % LANES == 0 or g == keys)
      if shares and fills:
        return chunks, h, k, v
  raise AssertionError('one head of whole registers always fits')
