"""Backward, parallel part: gradients of q, k, v and the gates of one chunk from stored pieces."""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  chunk_decays,
  decay_between,
  load_tile,
  store_tile,
)


@triton.jit
def _tile(pointer, rows, columns, first, row_seen, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
  """Columns first .. of a matrix whose row offsets are `rows`; zero beyond COLUMNS."""
  columns += first
  seen = row_seen[:, None] & (columns < COLUMNS)[None, :]
  return load_tile(pointer + rows[:, None] + columns[None, :], seen, EVEN)


@triton.jit
def _scaled(gate, tile):
  """Rows of a tile times a gate, in the tile's dtype."""
  return (gate[:, None] * tile.to(tl.float32)).to(tile.dtype)


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
  # T >> 30 is 0, which the compiler cannot know: unrolled, the loops would not fit the registers.
  tiles = (V + BLOCK_V - 1) // BLOCK_V + (T >> 30)

  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  tokens = start + i
  is_token = tokens < T
  is_key = a < K
  value_rows = i * (H * V)
  values = ((row + start) * H + head) * V
  piece_values = ((batch.to(tl.int64) * chunks + n) * C * H + head) * V
  do_ptr += values
  base_error_ptr += values
  residual_error_ptr += values
  dy_ptr += piece_values
  dz_ptr += piece_values
  dinnovation_ptr += piece_values
  STATES: tl.constexpr = (1 + RESIDUAL) * K * V
  states_ptr += (pair * total_chunks + first_chunk + n) * STATES
  dstates_ptr += (pair * chunks + n) * STATES

  keys = ((row + start) * G + head // (H // G)) * K
  key_seen = is_token[:, None] & is_key[None, :]
  key_offsets = i[:, None] * (G * K) + a[None, :]
  q = load_tile(q_ptr + keys + key_offsets, key_seen, EVEN)
  k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
  gate_offsets = (row + tokens) * H + head
  out_offsets = ((batch.to(tl.int64) * chunks + n) * C + i) * H + head
  beta = tl.load(beta_ptr + gate_offsets, mask=is_token, other=0.0)
  cumulative, before, era, era_before, is_reset = chunk_decays(
    log_decay_ptr, segments_ptr, batch, head, start, T, H, C, SEGMENTED
  )
  if RESIDUAL:
    gamma = tl.load(gamma_ptr + gate_offsets, mask=is_token, other=0.0)
  is_diagonal = i[:, None] == i[None, :]

  # Inside the chunk, queries on keys. Tiles are loaded again where they are needed again: held
  # in registers they would not leave room for the products.
  dscores = tl.zeros([C, C], tl.float32)
  do_W = tl.zeros([C, C], tl.float32)
  for tile in range(tiles):
    do = _tile(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    F = _tile(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dscores = tl.dot(do, tl.trans(F), dscores, input_precision=PRECISION)
    if RESIDUAL:
      F = _tile(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      do_W = tl.dot(do, tl.trans(F), do_W, input_precision=PRECISION)
  dscores *= beta[None, :]
  L = decay_between(cumulative, era, cumulative, era, True, C)
  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * L
  if RESIDUAL:
    do_W *= gamma[None, :]
    dgamma = tl.sum(scores * do_W, 1)
    dscores = tl.where(is_diagonal, 0.0, dscores) + gamma[:, None] * do_W
  flow = dscores * scores
  dG = tl.sum(flow, 1) - tl.sum(flow, 0)
  dscores_low = (dscores * L).to(dtype)

  # Keys on keys. dv falls out on the way.
  dgram = tl.zeros([C, C], tl.float32)
  dD_F = tl.zeros([C, C], tl.float32)
  dz_F = tl.zeros([C, C], tl.float32)
  for tile in range(tiles):
    F = _tile(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dy = _tile(dy_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dgram = tl.dot(dy, tl.trans(F), dgram, input_precision=PRECISION)
    dv = beta[:, None] * dy.to(tl.float32)
    if RESIDUAL:
      dD = _tile(dinnovation_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dD_F = tl.dot(dD, tl.trans(F), dD_F, input_precision=PRECISION)
      dv += dD.to(tl.float32)
      dz = _tile(dz_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      F = _tile(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dz_F = tl.dot(dz, tl.trans(F), dz_F, input_precision=PRECISION)
    columns = tile * BLOCK_V + e
    store_tile(
      dv_ptr + values + value_rows[:, None] + columns[None, :],
      dv.to(dtype),
      is_token[:, None] & (columns < V)[None, :],
      EVEN,
    )
  tl.store(dbeta_ptr + out_offsets, tl.sum(tl.where(is_diagonal, dgram, 0.0), 1))
  if DELTA or RESIDUAL:
    gram = tl.dot(k, tl.trans(k), input_precision=PRECISION)
  if DELTA:
    dgram *= beta[:, None] * beta[None, :]
  if RESIDUAL:
    dgamma += tl.sum(tl.where(is_diagonal, dz_F, 0.0), 1)
    if DELTA:
      dgram += gamma[:, None] * dz_F * gamma[None, :]
  if DELTA:
    L = decay_between(cumulative, era, cumulative, era, False, C)
    dgram = -dgram * L
    flow = dgram * gram
    dG += tl.sum(flow, 1) - tl.sum(flow, 0)
  if RESIDUAL:
    Lx = decay_between(before, era_before, cumulative, era, False, C)
    dD_F = -dD_F * beta[None, :] * Lx
    flow = dD_F * gram
    dGx = tl.sum(flow, 1)
    dG -= tl.sum(flow, 0)
    dgram = dgram + dD_F if DELTA else dD_F
  dgram_low = dgram.to(dtype)

  decay_in = tl.exp2(tl.where(era == 0, cumulative, float('-inf')))
  # dq: what the queries saw of the states. These enter as they are stored, [V, K].
  acc = tl.zeros([C, BLOCK_K], tl.float32)
  q = load_tile(q_ptr + keys + key_offsets, key_seen, EVEN)
  if RESIDUAL:
    for tile in range(tiles):
      do = _tile(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      state_rows = (tile * BLOCK_V + e) * K
      is_value = tile * BLOCK_V + e < V
      R = _tile(states_ptr + K * V, state_rows, a, 0, is_value, K, EVEN)
      acc = tl.dot(do, R, acc, input_precision=PRECISION)
    dgamma += decay_in * tl.sum(q.to(tl.float32) * acc, 1)
    tl.store(dgamma_ptr + out_offsets, dgamma)
    acc *= gamma[:, None]
  for tile in range(tiles):
    do = _tile(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    state_rows = (tile * BLOCK_V + e) * K
    is_value = tile * BLOCK_V + e < V
    S = _tile(states_ptr, state_rows, a, 0, is_value, K, EVEN)
    acc = tl.dot(do, S, acc, input_precision=PRECISION)
  acc *= decay_in[:, None]
  dG += tl.sum(q.to(tl.float32) * acc, 1)
  k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
  acc = tl.dot(dscores_low, k, acc, input_precision=PRECISION)
  dq_offsets = (row + start) * (H * K) + head * K + i[:, None] * (H * K) + a[None, :]
  store_tile(dq_ptr + dq_offsets, acc.to(dtype), key_seen, EVEN)

  # dk: what the keys saw of the states as readers (dX, dY), then as writers (U, W).
  acc = tl.zeros([C, BLOCK_K], tl.float32)
  k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
  if RESIDUAL:
    decay_before = tl.exp2(tl.where(era_before == 0, before, float('-inf')))
    for tile in range(tiles):
      dD = _tile(dinnovation_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      state_rows = (tile * BLOCK_V + e) * K
      is_value = tile * BLOCK_V + e < V
      S = _tile(states_ptr, state_rows, a, 0, is_value, K, EVEN)
      acc = tl.dot(_scaled(-decay_before, dD), S, acc, input_precision=PRECISION)
    before_read = tl.sum(k.to(tl.float32) * acc, 1)
    dGx += before_read
    dG -= before_read
  if DELTA:
    for tile in range(tiles):
      dy = _tile(dy_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      state_rows = (tile * BLOCK_V + e) * K
      is_value = tile * BLOCK_V + e < V
      S = _tile(states_ptr, state_rows, a, 0, is_value, K, EVEN)
      acc = tl.dot(_scaled(-decay_in * beta, dy), S, acc, input_precision=PRECISION)
      if RESIDUAL:
        dz = _tile(dz_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
        R = _tile(states_ptr + K * V, state_rows, a, 0, is_value, K, EVEN)
        acc = tl.dot(_scaled(-decay_in * gamma, dz), R, acc, input_precision=PRECISION)
  if DELTA or RESIDUAL:
    reads = tl.sum(k.to(tl.float32) * acc, 1)
    dG += reads
  last = tl.sum(tl.where(i == C - 1, cumulative, 0.0), 0)
  last_era = tl.sum(tl.where(i == C - 1, era, 0), 0)
  decay_out = tl.exp2(tl.where(era == last_era, last - cumulative, float('-inf')))
  carried = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
  for tile in range(tiles):
    F = _tile(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    state_rows = (tile * BLOCK_V + e) * K
    is_value = tile * BLOCK_V + e < V
    dS = _tile(dstates_ptr, state_rows, a, 0, is_value, K, EVEN)
    acc = tl.dot(_scaled(decay_out * beta, F), dS, acc, input_precision=PRECISION)
    S = _tile(states_ptr, state_rows, a, 0, is_value, K, EVEN)
    carried += S.to(tl.float32) * dS.to(tl.float32)
    if RESIDUAL:
      F = _tile(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dS = _tile(dstates_ptr + K * V, state_rows, a, 0, is_value, K, EVEN)
      acc = tl.dot(_scaled(decay_out * gamma, F), dS, acc, input_precision=PRECISION)
      S = _tile(states_ptr + K * V, state_rows, a, 0, is_value, K, EVEN)
      carried += S.to(tl.float32) * dS.to(tl.float32)
  writes = tl.sum(k.to(tl.float32) * acc, 1)
  if DELTA or RESIDUAL:
    writes -= reads
  decay_all = tl.sum(tl.where(i == C - 1, decay_in, 0.0), 0)
  closing = tl.sum(writes, 0) + decay_all * tl.sum(tl.sum(carried, 1), 0)
  dG += tl.where(i == C - 1, closing, 0.0) - writes
  if DELTA or RESIDUAL:
    acc = tl.dot(dgram_low, k, acc, input_precision=PRECISION)
  # These products come out as [K, C]: the transpose of a product of registers must not enter
  # another product (miscompiled for sm_90 by Triton 3.4 to 3.7.0).
  acc_t = tl.dot(tl.trans(q), dscores_low, input_precision=PRECISION)
  if DELTA or RESIDUAL:
    acc_t = tl.dot(tl.trans(k), dgram_low, acc_t, input_precision=PRECISION)
  acc += tl.trans(acc_t)
  store_tile(dk_ptr + dq_offsets, acc.to(dtype), key_seen, EVEN)

  # d log a_t: every dG from t on, and every dGx after t.
  if RESIDUAL:
    after = tl.sum(dG + dGx, 0) - tl.cumsum(dG + dGx, 0)
  else:
    after = tl.sum(dG, 0) - tl.cumsum(dG, 0)
  tl.store(dlog_decay_ptr + out_offsets, tl.where(is_reset, 0.0, after + dG))
