"""Kernel A, parallel over chunks: all that depends neither on values nor on states.

Decays, score matrices, prediction matrix Px and the inverses of recurrence equations (6) to (8),
formed in float32. With the delta rule, scores and prediction come multiplied by the inverse, to be
applied to what the inverse is applied to: what it gives, large and of changing sign where keys are
alike, would cancel after it was rounded.

The same matrices serve both passes. Forward, F = (I + A diag(b))^-1 y, so that F = U / b exists
where b is zero. The adjoint wants (I + diag(b) A)^-T, which is the transpose of that inverse with
its columns divided by b, and so are the scores and the prediction that it multiplies: the sweep
divides what all three give. Column i of each is proportional to b_i, whatever its size, so that
nothing is lost as long as the exponent has room: hence bfloat16 where inputs are float16, and a
strength of 1e-18 in place of 0.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  BASE_BEFORE,
  BASE_IN,
  BASE_OUT,
  BASE_UNDO,
  GATES,
  RESIDUAL_IN,
  RESIDUAL_OUT,
  RESIDUAL_READ,
  RESIDUAL_UNDO,
  chunk_decays,
  decay_between,
  decay_in,
  decay_out,
  load_decays,
  not_zero,
)
from rla_jax.kernels.residual.gpu.triangle import (
  inverse_of_16,
  inverse_quarters,
  parts_dot,
  quarters,
)

ROWS = tl.constexpr(GATES)
# Of the change above the diagonal of a stored inverse: see `store_inverse`.
LEAST = tl.constexpr(0.05)
MOST = tl.constexpr(2**-8)


def matrices(*, delta: bool, residual: bool) -> int:
  """Matrices a chunk, in this order where there are such: base scores, base inverse, residual
  scores, prediction, residual inverse.
  """
  return 1 + delta + 2 * residual + (delta and residual)


@triton.jit
def store_square(out, X, C: tl.constexpr):
  """Stores a matrix, or a quarter of one, whose rows are C apart."""
  i = tl.arange(0, X.shape[0])
  tl.store(out + i[:, None] * C + i[None, :], X.to(out.dtype.element_ty))


@triton.jit
def store_quarters(out, A, U, B, D, C: tl.constexpr):
  """Stores the matrix [[A, U], [B, D]]."""
  store_square(out, A, C)
  store_square(out + C // 2, U, C)
  store_square(out + C // 2 * C, B, C)
  store_square(out + C // 2 * C + C // 2, D, C)


@triton.jit
def halves(x, C: tl.constexpr):
  """The two halves of a vector of C."""
  return tl.split(tl.trans(tl.reshape(x, (2, C // 2))))


@triton.jit
def gain(w, X, dtype: tl.constexpr):
  """w^T X when X is rounded less w^T X, column by column."""
  return tl.sum(w[:, None] * (X.to(dtype).to(tl.float32) - X), 0)


@triton.jit
def change(gained, share):
  """What w is multiplied by in a column that has gained so much: see `store_inverse`."""
  return tl.minimum(tl.maximum(-gained * share, -MOST), MOST)


@triton.jit
def balanced(X, w, change_):
  """X with w times `change_` of a column in place of the zeros above its diagonal."""
  i = tl.arange(0, X.shape[0])
  return tl.where(i[:, None] < i[None, :], w[:, None] * change_[None, :], X)


@triton.jit
def store_inverse(out, A, A_t, gate, to_end, C: tl.constexpr, SOLVE: tl.constexpr):
  """Stores (I + A diag(gate))^-1; returns what `store_product` takes, the inverse times the gate.

  Of the lower triangle diag(gate) (I + A diag(gate))^-1 that is the upper left, lower left and
  lower right quarter, transposed; of 16 rows it is the whole, and nothing of use.

  What is stored in 16 bits keeps its sums down the columns, weighted by w, what the chunk's end
  sees of a token: all that a state, or on the way back the gradient of the errors, gets of the
  inverse where keys are one and the same. Otherwise such states are off by 0.3 to 0.6 % by nothing
  but the rounding of these elements. What column j gains by rounding is taken away above its
  diagonal, where elements are zero and numbers are fine, by the least change that does: row i gets
  w_i times -gain_j / sum_{i < j} w_i^2. So that the errors of early tokens and of small weights do
  not pay for it, LEAST is added to that sum, and MOST bounds what w_i is multiplied by: where keys
  and gates let an inverse grow, nobody pays more than an element of size 1 may lose to rounding.
  """
  dtype: tl.constexpr = out.dtype.element_ty
  N, N_t = A * gate[None, :], A_t * gate[:, None]
  if C == 16:
    X, X_t = inverse_of_16(N, N_t, SOLVE)
    if dtype != tl.float32:
      w = to_end * gate
      share = 1.0 / (tl.cumsum(w * w, 0) - w * w + LEAST)
      X = balanced(X, w, change(gain(w, X, dtype), share))
    store_square(out, X, C)
    return X_t * gate[None, :], X_t, X_t
  else:
    A, A_t, B, B_t, D, D_t = inverse_quarters(N, N_t, C, SOLVE)
    if dtype == tl.float32:
      store_quarters(out, A, tl.zeros_like(A), B, D, C)
    else:
      w = to_end * gate
      share = 1.0 / (tl.cumsum(w * w, 0) - w * w + LEAST)
      w_first, w_second = halves(w, C)
      first, second = halves(share, C)
      first = change(gain(w_first, A, dtype) + gain(w_second, B, dtype), first)
      store_square(out + C // 2 * C, B, C)
      store_square(out, balanced(A, w_first, first), C)
      second = change(gain(w_second, D, dtype), second)
      store_square(out + C // 2, w_first[:, None] * second[None, :], C)
      store_square(out + C // 2 * C + C // 2, balanced(D, w_second, second), C)
    first, second = halves(gate, C)
    return A_t * first[None, :], B_t * second[None, :], D_t * second[None, :]


@triton.jit
def store_product(out, S, A_t, B_t, D_t, C: tl.constexpr, SOLVE: tl.constexpr):
  """Stores the product of a lower triangular S with what `store_inverse` returned."""
  if C == 16:
    store_square(out, parts_dot(S, A_t, SOLVE), C)
  else:
    upper, _, lower_left, lower_right = quarters(S, C)
    B = parts_dot(lower_left, A_t, SOLVE) + parts_dot(lower_right, B_t, SOLVE)
    D = parts_dot(lower_right, D_t, SOLVE)
    store_quarters(out, parts_dot(upper, A_t, SOLVE), tl.zeros_like(B), B, D, C)


@triton.jit
def prepare_kernel(
  q_ptr,
  k_ptr,
  log_decay_ptr,
  beta_ptr,
  gamma_ptr,
  segments_ptr,
  T,
  chunks,
  matrices_ptr,
  gates_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  C: tl.constexpr,
  BLOCK_K: tl.constexpr,
  DELTA: tl.constexpr,
  RESIDUAL: tl.constexpr,
  SEGMENTED: tl.constexpr,
  PRECISION: tl.constexpr,
  SOLVE: tl.constexpr,
):
  """One chunk of one head. Grid (B * H * chunks,)."""
  chunk = tl.program_id(0).to(tl.int64)
  n = chunk % chunks
  batch = chunk // chunks // H
  head = chunk // chunks % H
  start = n * C

  i = tl.arange(0, C)
  columns = tl.arange(0, BLOCK_K)
  tokens = start + i
  row = batch * T
  keys = ((row + start) * G + head // (H // G)) * K
  offsets = i[:, None] * (G * K) + columns[None, :]
  seen = (tokens < T)[:, None] & (columns < K)[None, :]
  COUNT: tl.constexpr = 1 + DELTA + 2 * RESIDUAL + (DELTA and RESIDUAL)
  out = matrices_ptr + chunk * (COUNT * C * C)
  # All loads first, so that they are waited for once.
  decays = load_decays(log_decay_ptr, segments_ptr, batch, head, start, T, i, H, SEGMENTED)
  k = tl.load(k_ptr + keys + offsets, mask=seen, other=0.0)
  q = tl.load(q_ptr + keys + offsets, mask=seen, other=0.0)
  first_gate = (row + start) * H + head
  beta = not_zero(tl.load(beta_ptr + first_gate + i * H, mask=tokens < T, other=0.0))
  if RESIDUAL:
    gamma = not_zero(tl.load(gamma_ptr + first_gate + i * H, mask=tokens < T, other=0.0))
  cumulative, before, era, era_before, _ = chunk_decays(*decays, SEGMENTED)
  is_diagonal = i[:, None] == i[None, :]
  if not DELTA:
    L = decay_between(cumulative, era, cumulative, era, True, C)
  if DELTA or RESIDUAL:
    gram = tl.dot(k, tl.trans(k), input_precision=PRECISION)

  from_start = decay_in(cumulative, era)
  to_end = decay_out(cumulative, era, C)
  gates = gates_ptr + chunk * (ROWS * C) + i
  tl.store(gates + BASE_IN * C, from_start)
  tl.store(gates + BASE_OUT * C, to_end * beta)
  tl.store(gates + BASE_UNDO * C, 1.0 / beta)
  if RESIDUAL:
    tl.store(gates + BASE_BEFORE * C, decay_in(before, era_before))
    tl.store(gates + RESIDUAL_IN * C, from_start)
    tl.store(gates + RESIDUAL_READ * C, from_start * gamma)
    tl.store(gates + RESIDUAL_OUT * C, to_end * gamma)
    tl.store(gates + RESIDUAL_UNDO * C, 1.0 / gamma)

  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
  if DELTA:  # not before, where it would take registers that the keys and queries need
    L = decay_between(cumulative, era, cumulative, era, True, C)
  scores *= L
  if RESIDUAL:
    prediction = decay_between(before, era_before, cumulative, era, False, C) * gram
  if DELTA:
    A = tl.where(is_diagonal, 0.0, L * gram)
    A_t = tl.where(is_diagonal, 0.0, tl.trans(L) * gram)
  if DELTA:
    # T >> 30 is 0, which the compiler cannot know: unrolled, both inverses would be in registers.
    # With one state it is a loop too, or the compiler orders it so that it spills.
    for state in tl.range(1 + RESIDUAL + (T >> 30)):
      is_base = state == 0
      gate, read = beta, scores
      if RESIDUAL:
        gate = tl.where(is_base, beta, gamma)
      a, b, d = store_inverse(out + (1 + 3 * state) * C * C, A, A_t, gate, to_end, C, SOLVE)
      if RESIDUAL:
        if is_base:
          store_product(out + 3 * C * C, prediction, a, b, d, C, SOLVE)
        read = tl.where(is_base, 1.0, gamma)[:, None] * scores
        # The base read-out of the residual form leaves out the current token.
        read = tl.where(is_base & is_diagonal, 0.0, read)
      store_product(out + 2 * state * C * C, read, a, b, d, C, SOLVE)
  elif RESIDUAL:
    store_square(out, tl.where(is_diagonal, 0.0, scores) * beta[None, :], C)
    store_square(out + C * C, gamma[:, None] * scores * gamma[None, :], C)
    store_square(out + 2 * C * C, prediction * beta[None, :], C)
  else:
    store_square(out, scores * beta[None, :], C)
