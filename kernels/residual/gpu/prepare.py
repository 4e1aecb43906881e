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
  parts_dot,
  unit_lower_inverse,
)

ROWS = tl.constexpr(GATES)


def matrices(*, delta: bool, residual: bool) -> int:
  """Matrices a chunk, in this order where there are such: base scores, base inverse, residual
  scores, prediction, residual inverse.
  """
  return 1 + delta + 2 * residual + (delta and residual)


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
  dtype = matrices_ptr.dtype.element_ty
  COUNT: tl.constexpr = 1 + DELTA + 2 * RESIDUAL + (DELTA and RESIDUAL)
  out = matrices_ptr + chunk * (COUNT * C * C) + i[:, None] * C + i[None, :]
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

  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * L
  # The base read-out of the residual form leaves out the current token.
  base_scores = tl.where(is_diagonal, 0.0, scores) if RESIDUAL else scores
  if RESIDUAL:
    scores = gamma[:, None] * scores
    prediction = decay_between(before, era_before, cumulative, era, False, C) * gram
  if DELTA:
    A = tl.where(is_diagonal, 0.0, L * gram)
    inverse = unit_lower_inverse(A * beta[None, :], C, SOLVE)
    tl.store(out + C * C, inverse.to(dtype))
    through = beta[:, None] * inverse
    if RESIDUAL:
      tl.store(out + 3 * C * C, parts_dot(prediction, through, SOLVE).to(dtype))
    tl.store(out, parts_dot(base_scores, through, SOLVE).to(dtype))
    if RESIDUAL:
      inverse = unit_lower_inverse(A * gamma[None, :], C, SOLVE)
      tl.store(out + 4 * C * C, inverse.to(dtype))
      scores = parts_dot(scores, gamma[:, None] * inverse, SOLVE)
      tl.store(out + 2 * C * C, scores.to(dtype))
  else:
    tl.store(out, (base_scores * beta[None, :]).to(dtype))
    if RESIDUAL:
      tl.store(out + C * C, (scores * gamma[None, :]).to(dtype))
      tl.store(out + 2 * C * C, (prediction * beta[None, :]).to(dtype))
