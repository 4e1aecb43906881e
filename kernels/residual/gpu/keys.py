"""Backward, parallel part, second half: gradients of k, v and the gates of one chunk.

From stored pieces, and from what `queries` found of the scores and the gates.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  RESET,
  chunk_decays,
  decay_between,
  decay_in,
  decay_out,
  fresh,
  load_columns,
  load_decays,
  load_state,
  load_tile,
  scaled,
  store_tile,
)


@triton.jit
def store_dv(dv_ptr, value_rows, is_token, columns, dv, V: tl.constexpr, EVEN: tl.constexpr):
  """Stores columns of dv."""
  pointers = dv_ptr + value_rows[:, None] + columns[None, :]
  seen = is_token[:, None] & (columns < V)[None, :]
  store_tile(pointers, dv.to(dv_ptr.dtype.element_ty), seen, EVEN)


@triton.jit
def place(number, first_chunk, chunks, H: tl.constexpr, C: tl.constexpr):
  """Batch, head, first token and place in its piece of a program's chunk; see `fresh`."""
  program = fresh(tl.program_id(0), number)
  pair = (program // chunks).to(tl.int64)
  n = program % chunks
  return pair // H, pair % H, (first_chunk + n) * C, n


@triton.jit
def offsets(
  number, first_chunk, chunks, T, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr
):  # fmt: skip
  """Where its gates begin, its values, what the sweeps wrote, its state and the gradient of it."""
  batch, head, start, n = place(number, first_chunk, chunks, H, C)
  pair = batch * H + head
  gates = (batch * T + start) * H + head
  written = ((batch * chunks + n) * C * H + head) * V
  state = (pair * tl.cdiv(T, C) + first_chunk + n) * (K * V)
  return gates, gates * V, written, state, (pair * chunks + n) * (K * V)


@triton.jit
def keys_kernel(
  q_ptr,
  k_ptr,
  log_decay_ptr,
  beta_ptr,
  gamma_ptr,
  segments_ptr,
  base_error_ptr,
  residual_error_ptr,
  states_ptr,
  residual_states_ptr,
  dstates_ptr,
  residual_dstates_ptr,
  dy_ptr,
  dz_ptr,
  dprediction_ptr,
  dscores_ptr,
  dk_before_ptr,
  dv_before_ptr,
  dlog_decay_before_ptr,
  dgamma_before_ptr,
  dbeta_before_ptr,
  T,
  first_chunk,
  chunks,
  dk_ptr,
  dv_ptr,
  dlog_decay_ptr,
  dgamma_ptr,
  dbeta_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr,
  RESIDUAL: tl.constexpr,
  SEGMENTED: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
  STAGES: tl.constexpr,
  LOOPED: tl.constexpr,
):
  """One chunk of one head. Grid (B * H * chunks of the piece,).

  Pieces write to the same arrays, whose buffers the *_before arguments are. Read, and then written
  over, are of these dlog_decay and dgamma, as `queries` left them, and errors, whose places dk and
  dv may take: dk that of the residual error or else of the base one, dv of the base error of two
  states.
  """
  # Over the base error dv is written behind its last use, which takes another read of its parts.
  DV_LAST: tl.constexpr = DELTA and RESIDUAL
  # Products of whole tiles of two states take registers that only half as wide ones leave.
  NARROW: tl.constexpr = BLOCK_V // 2 if RESIDUAL and BLOCK_V >= 32 else BLOCK_V
  batch, head, start, _ = place(0, first_chunk, chunks, H, C)
  gates, values, written, state, dstate = offsets(0, first_chunk, chunks, T, H, K, V, C)
  dtype = k_ptr.dtype.element_ty
  # As in `queries`: not unrolled, and told their stages.
  tiles = (V + BLOCK_V - 1) // BLOCK_V + (T >> 30)
  narrow_tiles = (V + NARROW - 1) // NARROW + (T >> 30)
  # Of products that share a region Triton gives every warp rows of its own, and where those are too
  # few the same ones to several. LOOPED (eight warps without wgmma): each in a loop, of one turn.
  once = 1 + (T >> 30) if LOOPED else 1

  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  b = tl.arange(0, NARROW)
  is_token = start + i < T
  value_rows = i * (H * V)
  keys = ((batch * T + start) * G + head // (H // G)) * K
  q_ptr += keys
  k_ptr += keys
  key_seen = is_token[:, None] & (a < K)[None, :]
  decays = load_decays(log_decay_ptr, segments_ptr, batch, head, start, T, i, H, SEGMENTED)
  beta = tl.load(beta_ptr + gates + i * H, mask=is_token, other=0.0)
  if RESIDUAL:
    gamma = tl.load(gamma_ptr + gates + i * H, mask=is_token, other=0.0)

  # Inside the chunk.
  dgram = tl.zeros([C, C], tl.float32)
  dp_F = tl.zeros([C, C], tl.float32)
  dz_F = tl.zeros([C, C], tl.float32)
  for tile in tl.range(tiles, num_stages=STAGES):
    F = load_columns(base_error_ptr + values, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dy = load_columns(dy_ptr + written, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dgram = tl.dot(dy, tl.trans(F), dgram, input_precision=PRECISION)
    if RESIDUAL and not LOOPED:
      dp = load_columns(dprediction_ptr + written, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dp_F = tl.dot(dp, tl.trans(F), dp_F, input_precision=PRECISION)
      dz = load_columns(dz_ptr + written, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      F = load_columns(
        residual_error_ptr + values, value_rows, e, tile * BLOCK_V, is_token, V, EVEN
      )
      dz_F = tl.dot(dz, tl.trans(F), dz_F, input_precision=PRECISION)
    if not DV_LAST:
      dv = beta[:, None] * dy.to(tl.float32)
      if RESIDUAL:
        if LOOPED:
          dp = load_columns(
            dprediction_ptr + written, value_rows, e, tile * BLOCK_V, is_token, V, EVEN
          )
        dv -= dp.to(tl.float32)
      store_dv(dv_ptr + values, value_rows, is_token, tile * BLOCK_V + e, dv, V, EVEN)
  if RESIDUAL and LOOPED:
    for tile in tl.range(tiles, num_stages=STAGES):
      F = load_columns(base_error_ptr + values, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dp = load_columns(dprediction_ptr + written, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dp_F = tl.dot(dp, tl.trans(F), dp_F, input_precision=PRECISION)
    for tile in tl.range(tiles, num_stages=STAGES):
      dz = load_columns(dz_ptr + written, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      F = load_columns(
        residual_error_ptr + values, value_rows, e, tile * BLOCK_V, is_token, V, EVEN
      )
      dz_F = tl.dot(dz, tl.trans(F), dz_F, input_precision=PRECISION)
  key_offsets = fresh(i, T)[:, None] * (G * K) + a[None, :]
  out_gates = gates + fresh(i, T) * H
  dG = load_tile(dlog_decay_before_ptr + out_gates, is_token, EVEN)
  is_diagonal = i[:, None] == i[None, :]
  store_tile(dbeta_ptr + out_gates, tl.sum(tl.where(is_diagonal, dgram, 0.0), 1), is_token, EVEN)
  if RESIDUAL:
    dgamma = load_tile(dgamma_before_ptr + out_gates, is_token, EVEN)
    dgamma += tl.sum(tl.where(is_diagonal, dz_F, 0.0), 1)
    store_tile(dgamma_ptr + out_gates, dgamma, is_token, EVEN)
  cumulative, before, era, era_before, is_reset = chunk_decays(*decays, SEGMENTED)
  if DELTA or RESIDUAL:
    # Decayed before keys meet, so that nothing but sums is in registers when they do.
    if RESIDUAL:
      L = decay_between(before, era_before, cumulative, era, False, C)
      dp_F *= beta[None, :] * L
    else:
      L = decay_between(cumulative, era, cumulative, era, False, C)
    if DELTA:
      dgram *= -beta[:, None] * beta[None, :]
      if RESIDUAL:
        dgram -= gamma[:, None] * dz_F * gamma[None, :]
        # The rule reads a state that has decayed by the token's own decay, the prediction does not.
        dgram *= tl.where(is_reset, 0.0, tl.exp2(cumulative - before))[:, None]
      dgram *= L
    gram = tl.zeros([C, C], tl.float32)
    for _ in tl.range(once):
      k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
      gram = tl.dot(k, tl.trans(k), gram, input_precision=PRECISION)
    if DELTA:
      dG += tl.sum(dgram * gram, 1)
    if RESIDUAL:
      dGx = tl.sum(dp_F * gram, 1)
      dgram = dgram + dp_F if DELTA else dp_F
    dG -= tl.sum(dgram * gram, 0)
    dgram_low = dgram.to(dtype)

  # What the keys saw of the states as readers (dX, dY), then as writers (U, W).
  dk = tl.zeros([C, BLOCK_K], tl.float32)
  k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
  # Both before the loops, which then hold no cumulative decays.
  from_start = decay_in(cumulative, era)
  to_end = decay_out(cumulative, era, C)
  if RESIDUAL:
    decay_before = decay_in(before, era_before)
    for tile in tl.range(tiles, num_stages=STAGES):
      dp = load_columns(dprediction_ptr + written, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      S = load_state(states_ptr + state, tile * BLOCK_V + e, a, K, V, EVEN)
      dk = tl.dot(scaled(decay_before, dp), S, dk, input_precision=PRECISION)
    before_read = tl.sum(k.to(tl.float32) * dk, 1)
    dGx += before_read
    dG -= before_read
  if DELTA:
    for tile in tl.range(tiles, num_stages=STAGES):
      dy = load_columns(dy_ptr + written, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      S = load_state(states_ptr + state, tile * BLOCK_V + e, a, K, V, EVEN)
      dk = tl.dot(scaled(-from_start * beta, dy), S, dk, input_precision=PRECISION)
      if RESIDUAL:
        dz = load_columns(dz_ptr + written, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
        R = load_state(residual_states_ptr + state, tile * BLOCK_V + e, a, K, V, EVEN)
        dk = tl.dot(scaled(-from_start * gamma, dz), R, dk, input_precision=PRECISION)
  if DELTA or RESIDUAL:
    reads = tl.sum(k.to(tl.float32) * dk, 1)
    dG += reads
  # Found anew: held since the start they would take registers from the loops before.
  gates, values, written, state, dstate = offsets(T, first_chunk, chunks, T, H, K, V, C)
  carried = tl.zeros([NARROW, BLOCK_K], tl.float32)
  for tile in tl.range(narrow_tiles, num_stages=STAGES + 1):
    F = load_columns(base_error_ptr + values, value_rows, b, tile * NARROW, is_token, V, EVEN)
    dS = load_state(dstates_ptr + dstate, tile * NARROW + b, a, K, V, EVEN)
    dk = tl.dot(scaled(to_end * beta, F), dS, dk, input_precision=PRECISION)
    S = load_state(states_ptr + state, tile * NARROW + b, a, K, V, EVEN)
    carried += S.to(tl.float32) * dS.to(tl.float32)
    if DV_LAST:  # over F, which nobody reads any more
      dy = load_columns(dy_ptr + written, value_rows, b, tile * NARROW, is_token, V, EVEN)
      dp = load_columns(dprediction_ptr + written, value_rows, b, tile * NARROW, is_token, V, EVEN)
      dv = beta[:, None] * dy.to(tl.float32) - dp.to(tl.float32)
      store_dv(dv_ptr + values, value_rows, is_token, tile * NARROW + b, dv, V, EVEN)
  # A loop of its own: the shared memory of both together would leave one program a multiprocessor.
  if RESIDUAL:
    for tile in tl.range(narrow_tiles, num_stages=STAGES + 1):
      F = load_columns(residual_error_ptr + values, value_rows, b, tile * NARROW, is_token, V, EVEN)
      dS = load_state(residual_dstates_ptr + dstate, tile * NARROW + b, a, K, V, EVEN)
      dk = tl.dot(scaled(to_end * gamma, F), dS, dk, input_precision=PRECISION)
      S = load_state(residual_states_ptr + state, tile * NARROW + b, a, K, V, EVEN)
      carried += S.to(tl.float32) * dS.to(tl.float32)
  if LOOPED:
    k = load_tile(k_ptr + key_offsets, key_seen, EVEN)  # not kept in registers until here
  writes = tl.sum(k.to(tl.float32) * dk, 1)
  if DELTA or RESIDUAL:
    writes -= reads
  decay_all = tl.sum(tl.where(i == C - 1, from_start, 0.0), 0)
  closing = tl.sum(writes, 0) + decay_all * tl.sum(tl.sum(carried, 1), 0)
  dG += tl.where(i == C - 1, closing, 0.0) - writes
  q = load_tile(q_ptr + (fresh(i, chunks)[:, None] * (G * K) + a[None, :]), key_seen, EVEN)
  # Read again: kept from above it would take a register from the loops.
  out_gates = gates + fresh(i, first_chunk) * H
  is_reset = load_tile(log_decay_ptr + out_gates, is_token, EVEN) < RESET
  square = dstate // (K * V) * (C * C) + i[:, None] * C + i[None, :]
  dscores = tl.load(dscores_ptr + square)
  # These products come out as [K, C]: the transpose of a product of registers must not enter
  # another product (miscompiled for sm_90 by Triton 3.4 to 3.7.0).
  dk_t = tl.zeros([BLOCK_K, C], tl.float32)
  for _ in tl.range(once):
    dk_t = tl.dot(tl.trans(q), dscores, dk_t, input_precision=PRECISION)
  if DELTA or RESIDUAL:
    for _ in tl.range(once):
      k_again = load_tile(k_ptr + key_offsets, key_seen, EVEN) if LOOPED else k
      dk = tl.dot(dgram_low, k_again, dk, input_precision=PRECISION)
    for _ in tl.range(once):
      k_again = load_tile(k_ptr + key_offsets, key_seen, EVEN) if LOOPED else k
      dk_t = tl.dot(tl.trans(k_again), dgram_low, dk_t, input_precision=PRECISION)
  dk += tl.trans(dk_t)
  tl.debug_barrier()  # for whoever still reads what dk replaces
  dk_offsets = gates * K + i[:, None] * (H * K) + a[None, :]
  store_tile(dk_ptr + dk_offsets, dk.to(dtype), key_seen, EVEN)

  # d log a_t: every dG from t on, and every dGx after t.
  if RESIDUAL:
    after = tl.sum(dG + dGx, 0) - tl.cumsum(dG + dGx, 0)
  else:
    after = tl.sum(dG, 0) - tl.cumsum(dG, 0)
  store_tile(dlog_decay_ptr + out_gates, tl.where(is_reset, 0.0, after + dG), is_token, EVEN)
