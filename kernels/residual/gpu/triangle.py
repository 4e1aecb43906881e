"""Device functions: products and inverses of a chunk's triangular matrices, in registers.

One warp holds a chunk's matrices. What comes out of a product enters the next one on the left as it
lies, and on the right if it is the transpose that lies there; anything else is shuffled between
threads. So every matrix that a product takes on its right comes transposed, and an inverse is found
together with its transpose. Below 32 rows products go by quarters, of which a lower triangle has
three.
"""

import triton
import triton.language as tl


@triton.jit
def high_part(x):
  """The first half of the bits of float32 numbers: a bfloat16, still as float32.

  By a mask: of a conversion that is taken back, Triton would convert number by number.
  """
  return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def parts_dot(a, b_t, PRECISION: tl.constexpr):
  """a b of float32 tiles, b given transposed.

  'parts': of the two bfloat16 parts of each, exact to 2^-15.
  """
  b = tl.trans(b_t)  # before it is cut in parts, or Triton takes the parts through shared memory
  if PRECISION == 'parts':
    a_high, b_high = high_part(a), high_part(b)
    a_low, b_low = (a - a_high).to(tl.bfloat16), (b - b_high).to(tl.bfloat16)
    a_high, b_high = a_high.to(tl.bfloat16), b_high.to(tl.bfloat16)
    product = tl.dot(a_high, b_low)
    product = tl.dot(a_low, b_high, product)
    return tl.dot(a_high, b_high, product)
  else:
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def quarters(N, C: tl.constexpr):
  """The four quarters of a tile [C, C], row by row."""
  N = tl.permute(tl.reshape(N, (2, C // 2, 2, C // 2)), (1, 3, 0, 2))
  left, right = tl.split(N)
  upper_left, lower_left = tl.split(left)
  upper_right, lower_right = tl.split(right)
  return upper_left, upper_right, lower_left, lower_right


@triton.jit
def from_quarters(upper_left, upper_right, lower_left, lower_right, C: tl.constexpr):
  """The tile [C, C] of its quarters."""
  left = tl.join(upper_left, lower_left)
  right = tl.join(upper_right, lower_right)
  return tl.reshape(tl.permute(tl.join(left, right), (2, 0, 3, 1)), (C, C))


@triton.jit
def inverse_of_16(N, N_t, PRECISION: tl.constexpr):
  """(I + N)^-1 of a strictly lower triangular N [16, 16], and its transpose: see `unit_inverse`."""
  i = tl.arange(0, 16)[:, None]
  j = tl.arange(0, 16)[None, :]
  identity = tl.where(i == j, 1.0, 0.0)
  X = identity - tl.where(i // 2 == j // 2, N, 0.0)
  X_t = identity - tl.where(i // 2 == j // 2, N_t, 0.0)
  for level in tl.static_range(1, 4):
    half = 2**level
    beside = (i // (2 * half) == j // (2 * half)) & (i // half != j // half)
    step = parts_dot(X, tl.where(beside, N_t, 0.0), PRECISION)
    X, X_t = X - parts_dot(step, X_t, PRECISION), X_t - parts_dot(X_t, step, PRECISION)
  return X, X_t


@triton.jit
def inverse_quarters(N, N_t, C: tl.constexpr, PRECISION: tl.constexpr):
  """Upper left, lower left and lower right of (I + N)^-1, each followed by its own transpose."""
  A, _, _, D = quarters(N, C)
  A_t, B_t, _, D_t = quarters(N_t, C)
  A, A_t = unit_inverse(A, A_t, C // 2, PRECISION)
  D, D_t = unit_inverse(D, D_t, C // 2, PRECISION)
  step = parts_dot(D, B_t, PRECISION)
  B, B_t = -parts_dot(step, A_t, PRECISION), -parts_dot(A_t, step, PRECISION)
  return A, A_t, B, B_t, D, D_t


@triton.jit
def unit_inverse(N, N_t, C: tl.constexpr, PRECISION: tl.constexpr):
  """(I + N)^-1 of a strictly lower triangular N [C, C], and its transpose, by doubling the blocks.

  Powers of N over a whole chunk overflow for correlated keys; merging exact inverses of the
  diagonal blocks does not: [[A, 0], [B, D]]^-1 = [[A', 0], [-D' B A', D']].
  """
  if C == 16:
    return inverse_of_16(N, N_t, PRECISION)
  else:
    A, A_t, B, B_t, D, D_t = inverse_quarters(N, N_t, C, PRECISION)
    nothing = tl.zeros_like(B)
    return from_quarters(A, nothing, B, D, C), from_quarters(A_t, B_t, nothing, D_t, C)
