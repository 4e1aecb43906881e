"""Kernel A, parallel over chunks: all that depends neither on values nor on states.

Decays, score matrices, prediction matrix Px and the inverses of recurrence equations (6) to (8),
formed in float32 and stored in the dtype of the products that use them. With the delta rule, scores
and prediction come multiplied by the inverse, to be applied to what the inverse is applied to: what
it gives, large and of changing sign where keys are alike, would cancel after it was rounded.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  BASE_BEFORE,
  BASE_IN,
  BASE_OUT,
  BASE_READ,
  GAMMA,
  GATES,
  RESIDUAL_IN,
  RESIDUAL_OUT,
  RESIDUAL_READ,
  chunk_decays,
  decay_between,
  decay_in,
  decay_out,
  load_decays,
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
  first_chunk,
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
  ADJOINT: tl.constexpr,
  PRECISION: tl.constexpr,
  SOLVE: tl.constexpr,
):
  """One chunk of one head. Grid (B * H * chunks * PARTS,): with two inverses, a program for each.

  ADJOINT picks the side on which a gate stands. Forward: F = (I + A diag(b))^-1 rhs, so that
  F = U / b exists where b is zero. Backward: dy = (I + diag(b) A)^-T dU, for the same reason.
  """
  PARTS: tl.constexpr = 2 if DELTA and RESIDUAL else 1
  part = tl.program_id(0) % PARTS
  chunk = (tl.program_id(0) // PARTS).to(tl.int64)
  n = chunk % chunks
  batch = chunk // chunks // H
  head = chunk // chunks % H
  start = (first_chunk + n) * C

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
  beta = tl.load(beta_ptr + first_gate + i * H, mask=tokens < T, other=0.0)
  if RESIDUAL:
    gamma = tl.load(gamma_ptr + first_gate + i * H, mask=tokens < T, other=0.0)
  cumulative, before, era, era_before, _ = chunk_decays(*decays, SEGMENTED)
  is_diagonal = i[:, None] == i[None, :]
  L = decay_between(cumulative, era, cumulative, era, True, C)
  if DELTA or RESIDUAL:
    gram = tl.dot(k, tl.trans(k), input_precision=PRECISION)

  if part == PARTS - 1:
    from_start = decay_in(cumulative, era)
    to_end = decay_out(cumulative, era, C)
    gates = gates_ptr + chunk * (ROWS * C) + i
    tl.store(gates + BASE_IN * C, from_start)
    tl.store(gates + BASE_OUT * C, to_end if ADJOINT else to_end * beta)
    tl.store(gates + BASE_READ * C, from_start * beta)
    if RESIDUAL:
      tl.store(gates + BASE_BEFORE * C, decay_in(before, era_before))
      tl.store(gates + RESIDUAL_IN * C, from_start)
      tl.store(gates + RESIDUAL_READ * C, from_start * gamma)
      tl.store(gates + RESIDUAL_OUT * C, to_end if ADJOINT else to_end * gamma)
      tl.store(gates + GAMMA * C, gamma)

  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * L
  if DELTA:
    # The first part takes the base state, the last the residual one.
    is_base = (not RESIDUAL) or part == 0
    gate = beta
    if RESIDUAL:
      gate = tl.where(is_base, beta, gamma)
      # The base read-out of the residual form leaves out the current token.
      scores = tl.where(is_diagonal, 0.0, scores) if is_base else gate[:, None] * scores
      prediction = decay_between(before, era_before, cumulative, era, False, C) * gram
    N = tl.where(is_diagonal, 0.0, L * gram)
    N *= gate[:, None] if ADJOINT else gate[None, :]
    inverse = unit_lower_inverse(N, C, SOLVE)
    tl.store(out + (C * C if is_base else 4 * C * C), inverse.to(dtype))
    through = inverse if ADJOINT else gate[:, None] * inverse
    if RESIDUAL and part == 0:
      prediction = parts_dot(prediction, through, SOLVE)
      tl.store(out + 3 * C * C, prediction.to(dtype))
    scores = parts_dot(scores, through, SOLVE)
    tl.store(out + (0 if is_base else 2 * C * C), scores.to(dtype))
  else:
    base_scores = tl.where(is_diagonal, 0.0, scores) if RESIDUAL else scores
    tl.store(out, (base_scores if ADJOINT else base_scores * beta[None, :]).to(dtype))
    if RESIDUAL:
      scores = gamma[:, None] * scores
      tl.store(out + C * C, (scores if ADJOINT else scores * gamma[None, :]).to(dtype))
      prediction = decay_between(before, era_before, cumulative, era, False, C) * gram
      prediction = prediction if ADJOINT else prediction * beta[None, :]
      tl.store(out + 2 * C * C, prediction.to(dtype))
