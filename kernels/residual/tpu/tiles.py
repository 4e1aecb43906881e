"""What all kernels share: products at a stated precision, masks, and interleaving of heads."""

import jax.numpy as jnp
from jax import lax

from rla_jax.kernels.residual.tpu import tokens

# Which dimension of each operand is summed over.
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def dot(x, y, dims=NN, *, dtype):
  """A product accumulated in float32: one bf16 pass, or six if `dtype` is float32."""
  precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
  return lax.dot_general(
    x.astype(dtype), y.astype(dtype), (dims, ((), ())), precision=precision,
    preferred_element_type=jnp.float32,
  )  # fmt: skip


def iota(shape, axis):
  """int32 index along `axis`."""
  return lax.broadcasted_iota(jnp.int32, shape, axis)


class Columns:
  """The scalars of one chunk of one head, as columns [C, 1] and rows [1, C]."""

  def __init__(self, rows_RC):
    self._rows = rows_RC
    self._columns = rows_RC.T
    # A cut between a token's prediction and its write: its decay is zero.
    self.cuts_after = self.row(tokens.CUTS_BEFORE) + jnp.where(self.row(tokens.DECAY) == 0, 1.0, 0.0)

  def row(self, index):
    return self._rows[index : index + 1]

  def __getitem__(self, index):
    return self._columns[:, index : index + 1]

  def whole_chunk(self):
    """exp(G_C): what a state keeps across the chunk, [1, 1]."""
    last = self._rows[:, -1:]
    return last[tokens.DECAY : tokens.DECAY + 1] * last[tokens.FROM_START : tokens.FROM_START + 1]


def twice(row):
  """A row [1, C] beside itself: [1, 2C]."""
  return jnp.concatenate([row, row], axis=1)


def decay_pair(columns: Columns, chunk: int):
  """[Lx | Lx] [C, 2C]: Lx_ij = exp(Gx_i - G_j) for i > j with no cut between, else 0."""
  shape = (chunk, 2 * chunk)
  exponent = columns[tokens.DECAY_BEFORE] - twice(columns.row(tokens.DECAY_UPTO))
  joined = columns[tokens.CUTS_BEFORE] == twice(columns.cuts_after)
  joined &= iota(shape, 0) > iota(shape, 1) % chunk
  # An exponent outside the mask may be positive and overflow; the select drops it.
  return jnp.where(joined, jnp.exp(exponent), 0.0)


def interleave(programs):
  """Runs generators in turn, a stage each, so that independent heads stand side by side.

  The compiler's scheduler looks at a window of the program: with the stages of several heads next
  to each other the latency of one head's product is filled with another's.
  """
  programs = list(programs)
  while programs:
    programs = [p for p in programs if next(p, _DONE) is not _DONE]


_DONE = object()
