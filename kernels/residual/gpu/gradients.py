"""Backward, parallel part: gradients of q, k, v and the gates of one chunk from stored pieces."""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import chunk_decays, decay_between


@triton.jit
def _tile(pointer, offsets, seen, EVEN: tl.constexpr):
  if EVEN:
    return tl.load(pointer + offsets)
  return tl.load(pointer + offsets, mask=seen, other=0.0)


@triton.jit
def gradients_kernel(
  q_ptr,
  k_ptr,
  log_decay_ptr,
  beta_ptr,
  gamma_ptr,
  segments_ptr,
  do_ptr,
  base_error_ptr,
  residual_error_ptr,
  states_ptr,
  dstates_ptr,
  dy_ptr,
  dz_ptr,
  dinnovation_ptr,
  dq_before_ptr,
  dk_before_ptr,
  dv_before_ptr,
  T,
  first_chunk,
  dq_ptr,
  dk_ptr,
  dv_ptr,
  dlog_decay_ptr,
  dbeta_ptr,
  dgamma_ptr,
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
):
  """One chunk of one head. Grid (chunks of the piece, B * H).

  Pieces write to the same dq, dk, dv: the *_before arguments are their buffers, never read.
  """
  n = tl.program_id(0)
  chunks = tl.num_programs(0)
  batch = tl.program_id(1) // H
  head = tl.program_id(1) % H
  total_chunks = tl.cdiv(T, C)
  start = (first_chunk + n) * C
  row = batch.to(tl.int64) * T
  pair = tl.program_id(1).to(tl.int64)
  dtype = do_ptr.dtype.element_ty
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V

  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  tokens = start + i
  is_token = tokens < T
  key_seen = is_token[:, None] & (a < K)[None, :]
  key_offsets = i[:, None] * (G * K) + a[None, :]
  value_offsets = i[:, None] * (H * V) + e[None, :]
  state_offsets_t = a[None, :] * V + e[:, None]  # [V, K]: the states enter transposed
  keys = ((row + start) * G + head // (H // G)) * K
  values = ((row + start) * H + head) * V
  piece_values = ((batch.to(tl.int64) * chunks + n) * C * H + head) * V
  STATES: tl.constexpr = (1 + RESIDUAL) * K * V
  states_ptr += (pair * total_chunks + first_chunk + n) * STATES
  dstates_ptr += (pair * chunks + n) * STATES

  q = _tile(q_ptr + keys, key_offsets, key_seen, EVEN)
  k = _tile(k_ptr + keys, key_offsets, key_seen, EVEN)
  gate_offsets = (row + tokens) * H + head
  beta = tl.load(beta_ptr + gate_offsets, mask=is_token, other=0.0)
  cumulative, before, era, era_before, is_reset = chunk_decays(
    log_decay_ptr, segments_ptr, batch, head, start, T, H, C, SEGMENTED
  )
  if RESIDUAL:
    gamma = tl.load(gamma_ptr + gate_offsets, mask=is_token, other=0.0)
  decay_in = tl.exp2(tl.where(era == 0, cumulative, float('-inf')))
  decay_in_before = tl.exp2(tl.where(era_before == 0, before, float('-inf')))
  last = tl.sum(tl.where(i == C - 1, cumulative, 0.0), 0)
  last_era = tl.sum(tl.where(i == C - 1, era, 0), 0)
  decay_out = tl.exp2(tl.where(era == last_era, last - cumulative, float('-inf')))
  decay_all = tl.sum(tl.where(i == C - 1, decay_in, 0.0), 0)

  # Inside the chunk: products [C, C] of the value-sized pieces.
  do_U = tl.zeros([C, C], tl.float32)
  dy_F = tl.zeros([C, C], tl.float32)
  if RESIDUAL:
    do_W = tl.zeros([C, C], tl.float32)
    dz_F = tl.zeros([C, C], tl.float32)
    dD_F = tl.zeros([C, C], tl.float32)
  for tile in tl.static_range(TILES):
    seen = is_token[:, None] & (tile * BLOCK_V + e < V)[None, :]
    offsets = value_offsets + tile * BLOCK_V
    do = _tile(do_ptr + values, offsets, seen, EVEN)
    F = _tile(base_error_ptr + values, offsets, seen, EVEN)
    dy = _tile(dy_ptr + piece_values, offsets, seen, EVEN)
    F_t = tl.trans(F)
    do_U = tl.dot(do, F_t, do_U, input_precision=PRECISION)
    dy_F = tl.dot(dy, F_t, dy_F, input_precision=PRECISION)
    dv = beta[:, None] * dy.to(tl.float32)
    if RESIDUAL:
      dD = _tile(dinnovation_ptr + piece_values, offsets, seen, EVEN)
      dD_F = tl.dot(dD, F_t, dD_F, input_precision=PRECISION)
      dv += dD.to(tl.float32)
      dz = _tile(dz_ptr + piece_values, offsets, seen, EVEN)
      F_t = tl.trans(_tile(residual_error_ptr + values, offsets, seen, EVEN))
      do_W = tl.dot(do, F_t, do_W, input_precision=PRECISION)
      dz_F = tl.dot(dz, F_t, dz_F, input_precision=PRECISION)
    if EVEN:
      tl.store(dv_ptr + values + offsets, dv.to(dtype))
    else:
      tl.store(dv_ptr + values + offsets, dv.to(dtype), mask=seen)

  is_diagonal = i[:, None] == i[None, :]
  L = decay_between(cumulative, era, cumulative, era, True, C)
  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * L
  dbeta = tl.sum(tl.where(is_diagonal, dy_F, 0.0), 1)
  do_U *= beta[None, :]
  if RESIDUAL:
    dgamma = tl.sum(tl.where(is_diagonal, dz_F, 0.0), 1)
    do_W *= gamma[None, :]
    dgamma += tl.sum(scores * do_W, 1)
    dscores = tl.where(is_diagonal, 0.0, do_U) + gamma[:, None] * do_W
  else:
    dscores = do_U
  flow = dscores * scores
  dscores *= L
  dG = tl.sum(flow, 1) - tl.sum(flow, 0)
  if DELTA or RESIDUAL:
    gram = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    dgram = tl.zeros([C, C], tl.float32)
    if DELTA:
      dA = beta[:, None] * dy_F * beta[None, :]
      if RESIDUAL:
        dA += gamma[:, None] * dz_F * gamma[None, :]
      dgram = tl.where(is_diagonal, 0.0, -dA * L)
      flow = dgram * gram
      dG += tl.sum(flow, 1) - tl.sum(flow, 0)
    if RESIDUAL:
      Lx = decay_between(before, era_before, cumulative, era, False, C)
      dpx = -dD_F * beta[None, :] * Lx
      dgram += dpx
      flow = dpx * gram
      dGx = tl.sum(flow, 1)
      dG -= tl.sum(flow, 0)
    dgram = dgram.to(dtype)
  dscores = dscores.to(dtype)

  # dq: what the states saw of the queries.
  q_wide = q.to(tl.float32)
  acc = tl.zeros([C, BLOCK_K], tl.float32)
  if RESIDUAL:
    for tile in tl.static_range(TILES):
      state_seen = (a < K)[None, :] & (tile * BLOCK_V + e < V)[:, None]
      seen = is_token[:, None] & (tile * BLOCK_V + e < V)[None, :]
      do = _tile(do_ptr + values, value_offsets + tile * BLOCK_V, seen, EVEN)
      R_t = _tile(states_ptr + K * V, state_offsets_t + tile * BLOCK_V, state_seen, EVEN)
      acc = tl.dot(do, R_t, acc, input_precision=PRECISION)
    dgamma += decay_in * tl.sum(q_wide * acc, 1)
    acc *= gamma[:, None]
  for tile in tl.static_range(TILES):
    state_seen = (a < K)[None, :] & (tile * BLOCK_V + e < V)[:, None]
    seen = is_token[:, None] & (tile * BLOCK_V + e < V)[None, :]
    do = _tile(do_ptr + values, value_offsets + tile * BLOCK_V, seen, EVEN)
    S_t = _tile(states_ptr, state_offsets_t + tile * BLOCK_V, state_seen, EVEN)
    acc = tl.dot(do, S_t, acc, input_precision=PRECISION)
  acc *= decay_in[:, None]
  dG += tl.sum(q_wide * acc, 1)
  acc = tl.dot(dscores, k, acc, input_precision=PRECISION)
  dq_offsets = (row + start) * (H * K) + head * K + i[:, None] * (H * K) + a[None, :]
  if EVEN:
    tl.store(dq_ptr + dq_offsets, acc.to(dtype))
  else:
    tl.store(dq_ptr + dq_offsets, acc.to(dtype), mask=key_seen)

  # dk: what the states saw of the keys, as readers (dX, dY) and as writers (U, W).
  k_wide = k.to(tl.float32)
  acc = tl.zeros([C, BLOCK_K], tl.float32)
  if RESIDUAL:
    for tile in tl.static_range(TILES):
      state_seen = (a < K)[None, :] & (tile * BLOCK_V + e < V)[:, None]
      seen = is_token[:, None] & (tile * BLOCK_V + e < V)[None, :]
      dD = _tile(dinnovation_ptr + piece_values, value_offsets + tile * BLOCK_V, seen, EVEN)
      dX = (-decay_in_before[:, None] * dD.to(tl.float32)).to(dtype)
      S_t = _tile(states_ptr, state_offsets_t + tile * BLOCK_V, state_seen, EVEN)
      acc = tl.dot(dX, S_t, acc, input_precision=PRECISION)
    before_read = tl.sum(k_wide * acc, 1)
    dGx += before_read
  if DELTA:
    for tile in tl.static_range(TILES):
      state_seen = (a < K)[None, :] & (tile * BLOCK_V + e < V)[:, None]
      seen = is_token[:, None] & (tile * BLOCK_V + e < V)[None, :]
      dy = _tile(dy_ptr + piece_values, value_offsets + tile * BLOCK_V, seen, EVEN)
      dX = (-(decay_in * beta)[:, None] * dy.to(tl.float32)).to(dtype)
      S_t = _tile(states_ptr, state_offsets_t + tile * BLOCK_V, state_seen, EVEN)
      acc = tl.dot(dX, S_t, acc, input_precision=PRECISION)
      if RESIDUAL:
        dz = _tile(dz_ptr + piece_values, value_offsets + tile * BLOCK_V, seen, EVEN)
        dY = (-(decay_in * gamma)[:, None] * dz.to(tl.float32)).to(dtype)
        R_t = _tile(states_ptr + K * V, state_offsets_t + tile * BLOCK_V, state_seen, EVEN)
        acc = tl.dot(dY, R_t, acc, input_precision=PRECISION)
  all_reads = tl.sum(k_wide * acc, 1)
  dG += all_reads
  if RESIDUAL:
    dG -= before_read
  carried = 0.0
  for tile in tl.static_range(TILES):
    state_seen = (a < K)[None, :] & (tile * BLOCK_V + e < V)[:, None]
    seen = is_token[:, None] & (tile * BLOCK_V + e < V)[None, :]
    F = _tile(base_error_ptr + values, value_offsets + tile * BLOCK_V, seen, EVEN)
    U = ((decay_out * beta)[:, None] * F.to(tl.float32)).to(dtype)
    dS_t = _tile(dstates_ptr, state_offsets_t + tile * BLOCK_V, state_seen, EVEN)
    S_t = _tile(states_ptr, state_offsets_t + tile * BLOCK_V, state_seen, EVEN)
    acc = tl.dot(U, dS_t, acc, input_precision=PRECISION)
    carried += tl.sum(tl.sum(S_t.to(tl.float32) * dS_t.to(tl.float32), 1), 0)
    if RESIDUAL:
      F = _tile(residual_error_ptr + values, value_offsets + tile * BLOCK_V, seen, EVEN)
      W = ((decay_out * gamma)[:, None] * F.to(tl.float32)).to(dtype)
      dR_t = _tile(dstates_ptr + K * V, state_offsets_t + tile * BLOCK_V, state_seen, EVEN)
      R_t = _tile(states_ptr + K * V, state_offsets_t + tile * BLOCK_V, state_seen, EVEN)
      acc = tl.dot(W, dR_t, acc, input_precision=PRECISION)
      carried += tl.sum(tl.sum(R_t.to(tl.float32) * dR_t.to(tl.float32), 1), 0)
  writes = tl.sum(k_wide * acc, 1) - all_reads
  dG += tl.where(i == C - 1, tl.sum(writes, 0) + decay_all * carried, 0.0) - writes
  # The transposed products come out as [K, C]: the transpose of a product of registers must not
  # enter another product (miscompiled for sm_90 by Triton 3.4 to 3.7.0).
  acc_t = tl.dot(tl.trans(q), dscores, input_precision=PRECISION)
  if DELTA or RESIDUAL:
    acc = tl.dot(dgram, k, acc, input_precision=PRECISION)
    acc_t = tl.dot(tl.trans(k), dgram, acc_t, input_precision=PRECISION)
  acc += tl.trans(acc_t)
  if EVEN:
    tl.store(dk_ptr + dq_offsets, acc.to(dtype))
  else:
    tl.store(dk_ptr + dq_offsets, acc.to(dtype), mask=key_seen)

  # d log a_t: every dG from t on, and every dGx after t.
  if RESIDUAL:
    total = tl.sum(dG + dGx, 0)
    through = tl.cumsum(dG + dGx, 0)
    dlog_decay = total - through + dG
  else:
    dlog_decay = tl.sum(dG, 0) - tl.cumsum(dG, 0) + dG
  tl.store(
    dlog_decay_ptr + gate_offsets, tl.where(is_reset, 0.0, dlog_decay), mask=is_token
  )
  tl.store(dbeta_ptr + gate_offsets, dbeta, mask=is_token)
  if RESIDUAL:
    tl.store(dgamma_ptr + gate_offsets, dgamma, mask=is_token)
