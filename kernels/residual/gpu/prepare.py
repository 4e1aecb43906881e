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
def store_lower(out, A, B, D, C: tl.constexpr):
  """Stores the matrix [[A, 0], [B, D]]."""
  store_square(out, A, C)
  store_square(out + C // 2, tl.zeros_like(A), C)
  store_square(out + C // 2 * C, B, C)
  store_square(out + C // 2 * C + C // 2, D, C)


@triton.jit
def store_inverse(out, A, A_t, gate, C: tl.constexpr, SOLVE: tl.constexpr):
  """Stores (I + A diag(gate))^-1; returns what `store_product` takes, the inverse times the gate.

  Of the lower triangle diag(gate) (I + A diag(gate))^-1 that is the upper left, lower left and
  lower right quarter, transposed; of 16 rows it is the whole, and nothing of use.
  """
  N, N_t = A * gate[None, :], A_t * gate[:, None]
  if C == 16:
    X, X_t = inverse_of_16(N, N_t, SOLVE)
    store_square(out, X, C)
    return X_t * gate[None, :], X_t, X_t
  else:
    A, A_t, B, B_t, D, D_t = inverse_quarters(N, N_t, C, SOLVE)
    store_lower(out, A, B, D, C)
    first, second = tl.split(tl.trans(tl.reshape(gate, (2, C // 2))))
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
    store_lower(out, parts_dot(upper, A_t, SOLVE), B, D, C)


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
  # The base read-out of the residual form leaves out the current token.
  if DELTA and RESIDUAL:
    # T >> 30 is 0, which the compiler cannot know: unrolled, both inverses would be in registers.
    for state in tl.range(2 + (T >> 30)):
      is_base = state == 0
      gate = tl.where(is_base, beta, gamma)
      a, b, d = store_inverse(out + (1 + 3 * state) * C * C, A, A_t, gate, C, SOLVE)
      if is_base:
        store_product(out + 3 * C * C, prediction, a, b, d, C, SOLVE)
      read = tl.where(is_base, 1.0, gamma)[:, None] * scores
      read = tl.where(is_base & is_diagonal, 0.0, read)
      store_product(out + 2 * state * C * C, read, a, b, d, C, SOLVE)
  elif DELTA:
    a, b, d = store_inverse(out + C * C, A, A_t, beta, C, SOLVE)
    store_product(out, scores, a, b, d, C, SOLVE)
  elif RESIDUAL:
    store_square(out, tl.where(is_diagonal, 0.0, scores) * beta[None, :], C)
    store_square(out + C * C, gamma[:, None] * scores * gamma[None, :], C)
    store_square(out + 2 * C * C, prediction * beta[None, :], C)
  else:
    store_square(out, scores * beta[None, :], C)
