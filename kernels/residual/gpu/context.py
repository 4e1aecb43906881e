"""What all kernels of one call are given."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rla_jax.kernels.residual.gpu.blocks import MULTIPROCESSORS, WALKS, Blocks, parts
from rla_jax.kernels.residual.gpu.handover import HANDED_AT_A_TIME
from rla_jax.kernels.residual.gpu.launch import launch
from rla_jax.kernels.residual.gpu.prepare import matrices, prepare_kernel
from rla_jax.kernels.residual.gpu.tiles import GATES


class Saved(NamedTuple):
  """What the forward pass leaves to the backward pass; None for what a rule has not."""

  states: Any  # before every span of chunks
  residual_states: Any
  base_error: Any  # F of both states
  residual_error: Any
  passes: Any  # where the residual passes the clip: a bit a token, in words of 32 a chunk and value
  matrices: Any
  gates: Any


# Dimensions of what the kernels read and write, for the partitioning rule.
INPUTS = ('BTGK', 'BTGK', 'BTHV', 'BTH', 'BTH', 'BTH', 'BHKV', 'BHKV', 'BT')
OUTPUTS = ('BTHV', 'BHKV', 'BHKV')
SAVED = Saved('BHNVK', 'BHNVK', 'BTHV', 'BTHV', 'BHCWV', 'BHCMIJ', 'BHCRI')


@dataclasses.dataclass(frozen=True)
class Config:
  """What is fixed when a call is compiled."""

  delta: bool
  residual: bool
  clip: float | None
  blocks: Blocks
  interpret: bool

  def __post_init__(self):
    if self.blocks.pair and not self.residual:
      raise ValueError(f'blocks.pair is {self.blocks.pair}, expected None: one state has no pair')
    if self.blocks.walk not in (None, *WALKS):
      raise ValueError(f'blocks.walk is {self.blocks.walk!r}, expected None or one of {WALKS}')
    if (self.blocks.apart or self.blocks.walk in ('pair', 'apart')) and not self.blocks.pair:
      raise ValueError(
        f'blocks.apart is {self.blocks.apart} and walk {self.blocks.walk!r}, with pair None; '
        'expected the launch of a state'
      )


def _block(size: int) -> int:
  return max(16, 1 << (size - 1).bit_length())


def _precision(dtype) -> str:
  """Of products: exact for 16-bit operands, three passes on the tensor cores for float32."""
  return 'tf32x3' if dtype == jnp.float32 else 'tf32'


def array(shape, dtype) -> jax.ShapeDtypeStruct:
  """An output of a kernel."""
  return jax.ShapeDtypeStruct(shape, dtype)


class Call:
  """What all kernels of one call are told: its sizes, its gates, and how to launch."""

  def __init__(self, config, q, k, v, log_decay, beta, gamma, segments):
    self.config = config
    self.q, self.k, self.v = q, k, v
    self.gates = (log_decay, beta, beta if gamma is None else gamma)
    self.segments = log_decay if segments is None else segments
    self.B, self.T, self.G, self.K = k.shape
    self.H, self.V = v.shape[2:]
    self.pairs = self.B * self.H
    self.tokens = config.blocks.chunk * config.blocks.span  # of a parallel kernel's program
    self.spans = -(-self.T // self.tokens)
    self.is_segmented = segments is not None

  def launch(self, kernel, *arguments, out_shape, programs, block, C, aliases=None, **constexprs):
    """Runs a kernel. The constexprs that every kernel or nearly every one has are filled in."""
    known = {
      'H': self.H, 'G': self.G, 'K': self.K, 'V': self.V, 'C': C, 'BLOCK_K': _block(self.K),
      'BLOCK_V': block.value, 'DELTA': self.config.delta, 'RESIDUAL': self.config.residual,
      'CLIP': self.config.clip, 'SPAN': self.config.blocks.span, 'SEGMENTED': self.is_segmented,
      'EVEN': self._is_even(block.value), 'PRECISION': _precision(self.q.dtype),
      'STAGES': block.stages, 'LOOPED': self.config.blocks.looped and block.warps > 4,
      'HANDED': HANDED_AT_A_TIME,
    }  # fmt: skip
    names = {p.name for p in kernel.params if p.is_constexpr}
    known = {n: x for n, x in known.items() if n in names} | constexprs
    return launch(
      kernel,
      *arguments,
      out_shape=out_shape,
      grid=(programs,),
      num_warps=block.warps,
      num_stages=block.stages,
      aliases=aliases,
      interpret=self.config.interpret,
      **known,
    )

  def walk(self, block, split=1) -> int:
    """Programs of a kernel that walks the chunks of every head, or of parts of it."""
    return self.pairs * split * -(-self.V // block.value)

  def flags(self, block):
    """What programs that follow others in a launch begin with (`handover.take_turn`)."""
    return jnp.zeros(1 + self.walk(block), jnp.int32)

  def split(self, spans, block) -> int:
    """Parts of a sequence of so many spans that are walked side by side."""
    return parts(self.config.blocks, block, value_dim=self.V, heads=self.pairs, spans=spans)

  def piece(self) -> int:
    """Spans of a piece of the backward pass, the last of which may be shorter.

    Up to an eighth longer than it must be, if that fills the last round of the parallel kernels,
    which run two programs on a multiprocessor (of large heads one).
    """
    size = -(-self.spans // min(self.config.blocks.pieces, self.spans))
    rounds = -(-size * self.pairs // (2 * MULTIPROCESSORS))
    filled = rounds * 2 * MULTIPROCESSORS // self.pairs
    return filled if size < filled <= size + size // 8 else size

  def _is_even(self, block_v):
    """Whether no tile needs a mask."""
    return self.T % self.tokens == 0 and _block(self.K) == self.K and self.V % max(1, block_v) == 0

  def prepare(self):
    """Matrices and gates of all chunks."""
    delta, residual = self.config.delta, self.config.residual
    C, chunks = self.config.blocks.chunk, self.spans * self.config.blocks.span
    log_decay, beta, gamma = self.gates
    is_wide = self.q.dtype == jnp.float32
    return self.launch(
      prepare_kernel,
      *(self.q, self.k, log_decay, beta, gamma, self.segments),
      *(self.T, chunks),
      out_shape=(
        array(
          (self.B, self.H, chunks, matrices(delta=delta, residual=residual), C, C),
          jnp.float32 if is_wide else jnp.bfloat16,  # `prepare` says why not float16
        ),
        array((self.B, self.H, chunks, GATES, C), jnp.float32),
      ),
      programs=chunks * self.pairs,
      block=self.config.blocks.prepare,
      C=C,
      # Two bfloat16 parts are exact to 3e-5, far below the rounding of 16-bit results.
      SOLVE='tf32x3' if is_wide else 'parts',
    )
