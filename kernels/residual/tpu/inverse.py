"""The triangular inverses of the delta rule, for all chunks at once: they need neither values nor state.

For a chunk with Gram matrix A (equation 6), and gate b or g on the diagonal:

    T = (I + A diag(gate))^-1      so that    F = T (V - E X),   U = diag(gate) F

which is B diag(gate) of the equations with the gate moved to the right: rows of T then need no
scaling and F, whose product with the adjoint is the gate's gradient, appears by itself.

Both gates side by side, [A diag(b) | A diag(g)], fill the lanes. The method is exact block by
block and never forms a power of A over more than its size: 8 x 8 diagonal blocks by forward
substitution on the vector unit in float32, then merges

    [[D1, 0], [N, D2]]^-1 = [[D1^-1, 0], [-D2^-1 N D1^-1, D2^-1]]

at 8, 16, 32. Their products take float32 operands as sums of two bf16 parts and keep three of the
four partial products. The parts of an operand share one pass of the matrix unit: the
off-diagonal half of each block pair is zero, and holds the low part.
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
  chunk, lanes = n_pair.shape
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
  is_even = lane // size % 2 == 0
  pair_of_row = iota(half, 0) // size
  off_diagonal = is_even & (lane // (2 * size) == pair_of_row)

  n = jnp.where(off_diagonal, jnp.concatenate([strips[i] for i in odd]), 0.0)
  d_even = jnp.concatenate([inverse[i - per] for i in odd])
  d_odd = jnp.concatenate([inverse[i] for i in odd])

  x = yield from _block_product(n, d_even, is_even, size, split)
  y = yield from _block_product(_roll(d_odd, -size), x, is_even, size, split)
  merged = list(inverse)
  for j, i in enumerate(odd):
    merged[i] = inverse[i] - y[j * SUB : (j + 1) * SUB]
  return merged


def _block_product(x, y, is_even, size, split):
  """Products of the blocks of x and y, a pair of blocks at a time, where both fill even lanes.

  x, y [C/2, 2C]: block pair p in rows p * size onwards and in the even lanes of pair p.
  With `split`, odd lanes of x take its low part and odd lanes of y the low part of y:

      [x_hi | x_lo] [[y_hi, y_lo], [y_hi, 0]] = [x_hi y_hi + x_lo y_hi | x_hi y_lo]
  """
  if split:
    x_hi, x_lo = _parts(x)
    y_hi, y_lo = _parts(y)
    x = x_hi + _roll(x_lo, size)
    out = yield from _expand_and_multiply(x, y_hi + _roll(y_lo, size), y_hi, size, jnp.bfloat16)
    out = out + _roll(out, -size)
  else:
    out = yield from _expand_and_multiply(x, y, jnp.zeros_like(y), size, jnp.float32)
  return jnp.where(is_even, out, 0.0)


def _expand_and_multiply(x, y_even, y_odd, size, dtype):
  """x [C/2, 2C] times the block diagonal matrix whose rows are y_even, y_odd in turn, per gate."""
  lanes = x.shape[1]
  chunk = lanes // 2
  rows = []
  for i in range(0, y_even.shape[0], size):
    rows += [y_even[i : i + size], y_odd[i : i + size]]
  y = jnp.concatenate(rows)
  first = iota((chunk, lanes), 1) < chunk
  weights = jnp.concatenate([jnp.where(first, y, 0.0), jnp.where(first, 0.0, y)])
  out = dot(x, weights, dtype=dtype)
  yield
  return out


def _parts(x):
  hi = x.astype(jnp.bfloat16).astype(jnp.float32)
  return hi, x - hi


def _roll(x, by):
  return pltpu.roll(x, by % x.shape[1], 1)
