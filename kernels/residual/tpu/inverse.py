"""The triangular inverses of the delta rule, for all chunks at once.

They need neither values nor states, so the kernel is parallel over chunks.
For a chunk with Gram matrix A (equation 6), and gate b or g on the diagonal:

    T = (I + A diag(gate))^-1      so that    F = T (V - E X),   U = diag(gate) F

which is B diag(gate) of the equations with the gate moved to the right: rows of T then need no
scaling and F, whose product with the adjoint is the gate's gradient, appears by itself.

Both gates side by side, [A diag(b) | A diag(g)], fill the lanes. The method is exact block by
block and never forms a power of A over more than its size: 8 x 8 diagonal blocks by forward
substitution on the vector unit in float32, then merges

    [[D1, 0], [N, D2]]^-1 = [[D1^-1, 0], [-D2^-1 N D1^-1, D2^-1]]

at 8, 16, 32. Their products take float32 operands as sums of two bf16 parts and keep three of the
four partial products; for float32 inputs they are at full float32 precision.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rla_jax.kernels.residual.tpu import blocks, tiles, tokens
from rla_jax.kernels.residual.tpu.blocks import Plan
from rla_jax.kernels.residual.tpu.tiles import NT, dot, iota

SUB = 8  # sublanes of a register: the size of the blocks that substitution inverts


def prepare(plan: Plan, k_BTF, v_BTF, rows_BHNRC):
  """Runs the kernel: [T_b | T_g] of every chunk, [B, H, N, C, 2 C] in k's dtype."""
  spec = plan.specs()
  batch, heads, n_chunks = rows_BHNRC.shape[:3]
  shape = (batch, heads, n_chunks, plan.chunk, 2 * plan.chunk)
  return pl.pallas_call(
    functools.partial(prepare_kernel, plan=plan),
    grid=plan.grid(v_BTF),
    in_specs=[spec['key'], spec['rows']],
    out_specs=spec['inverse'],
    out_shape=blocks.struct(shape, k_BTF.dtype, k_BTF, rows_BHNRC),
    name='residual_prepare',
    **plan.params(sequential=False),
  )(k_BTF, rows_BHNRC)


def prepare_kernel(k_ref, rows_ref, inverse_ref, *, plan: Plan):
  """One grid step: k [1, c C, keys K], rows [1, h, c, R, C]; out: inverse [1, h, c, C, 2 C]."""

  def body(n, _):
    scalars = tiles.scalars(rows_ref, n, plan.heads)
    tiles.interleave(_prepare(k_ref, c, inverse_ref, n, h, plan) for h, c in enumerate(scalars))
    return 0

  jax.lax.fori_loop(0, plan.chunks, body, 0)


def _prepare(k_ref, c, inverse_ref, n, h, plan):
  dtype = k_ref.dtype
  k = k_ref[0, plan.tokens_of(n), plan.keys_of(h)]
  gram = dot(k, jnp.concatenate([k, k]), NT, dtype=dtype)
  yield
  gates = c.column(tokens.DECAY, 2 * plan.chunk) * c.rows(tokens.BETA, tokens.GAMMA)
  n_pair = gram * tiles.decay_pair(c, plan.chunk) * gates
  yield
  inverse = yield from invert_pair(n_pair, split=dtype != jnp.float32)
  inverse_ref[0, h, n] = inverse.astype(inverse_ref.dtype)


def invert_pair(n_pair, *, split):
  """(I + N)^-1 for the two strictly lower triangular N in [N_b | N_g] [C, 2C], side by side.

  A generator that returns the inverses; it yields between stages. `split`: float32 operands as two
  bf16 parts and three passes; otherwise products at full float32 precision.
  """
  chunk = n_pair.shape[0]
  strips = [n_pair[i : i + SUB] for i in range(0, chunk, SUB)]
  inverse = _diagonal_blocks(strips, chunk)
  yield
  size = SUB
  while size < chunk:
    inverse = yield from _merge(strips, inverse, size, split)
    size *= 2
  return jnp.concatenate(inverse)


def _diagonal_blocks(strips, chunk):
  """Inverse of the 8 x 8 diagonal blocks by forward substitution; strips of 8 rows in and out."""
  shape = strips[0].shape
  lane, row = iota(shape, 1), iota(shape, 0)
  block = lane % chunk // SUB
  # The blocks stand in different lanes, so one register row holds them all.
  n = strips[0]
  for i, strip in enumerate(strips[1:], 1):
    n = jnp.where(block == i, strip, n)
  n = jnp.where(row > lane % SUB, n, 0.0)
  t = jnp.where(row == lane % SUB, 1.0, 0.0)
  for s in range(SUB - 1):
    column = jnp.take_along_axis(n, lane // SUB * SUB + s, axis=1)
    t = t - column * t[s : s + 1]
  return [jnp.where(block == i, t, 0.0) for i in range(len(strips))]


def _merge(strips, inverse, size, split):
  """Doubles the diagonal blocks of `inverse` from `size`; strips of 8 rows in and out."""
  chunk, lanes = len(strips) * SUB, strips[0].shape[1]
  per = size // SUB
  odd = [i for i in range(len(strips)) if i // per % 2]
  half = (len(odd) * SUB, lanes)
  lane = iota(half, 1) % chunk
  off_diagonal = lane // size == iota(half, 0) // size * 2

  n = jnp.where(off_diagonal, jnp.concatenate([strips[i] for i in odd]), 0.0)
  d_even = jnp.concatenate([inverse[i - per] for i in odd])
  d_odd = jnp.concatenate([inverse[i] for i in odd])

  multiply = _split_product if split else _exact_product
  x = yield from multiply(n, d_even, size, 0)
  y = yield from multiply(d_odd, x, size, 1)
  merged = list(inverse)
  for j, i in enumerate(odd):
    merged[i] = inverse[i] - y[j * SUB : (j + 1) * SUB]
  return merged


def _exact_product(x, y, size, parity):
  """Products of the blocks of x and y, a pair of blocks at a time, in float32.

  x, y [C/2, 2C]: rows p * size onwards belong to block pair p. The blocks of x stand in the even
  (`parity` 0) or odd (1) lanes of their pair; the result stands where y does.
  """
  zero = jnp.zeros_like(y)
  weights = _alternate(zero, y, size) if parity else _alternate(y, zero, size)
  out = dot(x, _block_diagonal(weights), dtype=jnp.float32)
  yield
  return out


def _split_product(x, y, size, parity):
  """`_exact_product` from bf16 parts of both, x_hi y_hi + x_hi y_lo + x_lo y_hi.

  The free half of the lanes takes a second x_hi, facing the low part of y:

      [x_hi | x_hi]   [y_hi]
      [x_lo |  0  ] * [y_lo]        and the two halves of the rows are summed.
  """
  x_hi, x_lo = _parts(x)
  y_hi, y_lo = _parts(y)
  away = _roll(x_hi, -size if parity else size)
  left = jnp.concatenate([x_hi + away, x_lo]).astype(jnp.bfloat16)
  weights = _alternate(y_lo, y_hi, size) if parity else _alternate(y_hi, y_lo, size)
  out = dot(left, _block_diagonal(weights), dtype=jnp.bfloat16)
  yield
  half = x.shape[0]
  return out[:half] + out[half:]


def _alternate(even, odd, size):
  """Rows of blocks: even ones from one array, odd ones from the other."""
  rows = []
  for i in range(0, even.shape[0], size):
    rows += [even[i : i + size], odd[i : i + size]]
  return jnp.concatenate(rows)


def _block_diagonal(pair):
  """[X | Y] [C, 2C] as [[X, 0], [0, Y]]."""
  first = iota(pair.shape, 1) < pair.shape[0]
  return jnp.concatenate([jnp.where(first, pair, 0.0), jnp.where(first, 0.0, pair)])


def _parts(x):
  hi = x.astype(jnp.bfloat16).astype(jnp.float32)
  return hi, x - hi


def _roll(x, by):
  return pltpu.roll(x, by % x.shape[1], 1)
