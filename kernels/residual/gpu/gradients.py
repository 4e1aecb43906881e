"""Backward, parallel part: gradients of q, k, v and the gates of one chunk from stored pieces.

Two programs a chunk, since one would not fit the registers: one for the queries, one for the keys
and values. They run side by side and find in the cache what both read.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  chunk_decays,
  decay_between,
  decay_until,
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
def _rows_dot(pointers, zero, acc, seen, EVEN: tl.constexpr):
  """sum over columns of tile * acc.

  `zero` is 0, which the compiler cannot know: so it loads the tile here, instead of holding that of
  an earlier load in registers.
  """
  return tl.sum(load_tile(pointers + zero, seen, EVEN).to(tl.float32) * acc, 1)


@triton.jit
def _queries(
  q_ptr, k_ptr, beta, gamma, cumulative, era, do_ptr, base_error_ptr, residual_error_ptr,
  states_ptr, key_offsets, value_rows, is_token, dq_pointers, zero,
  K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
  RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Writes dq; returns the queries' share of dG and dgamma."""
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  is_diagonal = i[:, None] == i[None, :]
  key_seen = is_token[:, None] & (a < K)[None, :]

  do_U = tl.zeros([C, C], tl.float32)
  do_W = tl.zeros([C, C], tl.float32)
  for tile in range(TILES + zero):
    do = _tile(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    F = _tile(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    do_U = tl.dot(do, tl.trans(F), do_U, input_precision=PRECISION)
    if RESIDUAL:
      F = _tile(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      do_W = tl.dot(do, tl.trans(F), do_W, input_precision=PRECISION)
  q = load_tile(q_ptr + key_offsets, key_seen, EVEN)
  k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
  L = decay_between(cumulative, era, cumulative, era, True, C)
  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * L
  dscores = do_U * beta[None, :]
  dgamma = tl.zeros([C], tl.float32)
  if RESIDUAL:
    do_W *= gamma[None, :]
    dgamma = tl.sum(scores * do_W, 1)
    dscores = tl.where(is_diagonal, 0.0, dscores) + gamma[:, None] * do_W
  flow = dscores * scores
  dG = tl.sum(flow, 1) - tl.sum(flow, 0)
  dscores_low = (dscores * L).to(q.dtype)

  # The states enter as they are stored, [V, K].
  decay_in = tl.exp2(tl.where(era == 0, cumulative, float('-inf')))
  acc = tl.zeros([C, BLOCK_K], tl.float32)
  if RESIDUAL:
    for tile in range(TILES + zero):
      do = _tile(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      is_value = tile * BLOCK_V + e < V
      R = _tile(states_ptr + K * V, (tile * BLOCK_V + e) * K, a, 0, is_value, K, EVEN)
      acc = tl.dot(do, R, acc, input_precision=PRECISION)
    dgamma += decay_in * _rows_dot(q_ptr + key_offsets, zero, acc, key_seen, EVEN)
    acc *= gamma[:, None]
  for tile in range(TILES + zero):
    do = _tile(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    is_value = tile * BLOCK_V + e < V
    S = _tile(states_ptr, (tile * BLOCK_V + e) * K, a, 0, is_value, K, EVEN)
    acc = tl.dot(do, S, acc, input_precision=PRECISION)
  acc *= decay_in[:, None]
  dG += _rows_dot(q_ptr + key_offsets, 2 * zero, acc, key_seen, EVEN)
  k = load_tile(k_ptr + key_offsets + zero, key_seen, EVEN)
  acc = tl.dot(dscores_low, k, acc, input_precision=PRECISION)
  store_tile(dq_pointers, acc.to(q.dtype), key_seen, EVEN)
  return dG, dgamma


@triton.jit
def _keys(
  q_ptr, k_ptr, beta, gamma, cumulative, before, era, era_before, do_ptr, base_error_ptr,
  residual_error_ptr, states_ptr, dstates_ptr, dy_ptr, dz_ptr, dinnovation_ptr, key_offsets,
  value_rows, is_token, dk_pointers, dv_ptr, zero,
  K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """Writes dk and dv; returns dbeta and the keys' share of dG, dGx and dgamma."""
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  is_diagonal = i[:, None] == i[None, :]
  key_seen = is_token[:, None] & (a < K)[None, :]
  dGx = tl.zeros([C], tl.float32)
  dgamma = tl.zeros([C], tl.float32)

  # What the queries saw of the keys, [keys, queries]: formed anew, since the transpose of a product
  # held in registers must not enter another (miscompiled for sm_90 by Triton 3.4 to 3.7.0).
  U_do = tl.zeros([C, C], tl.float32)
  W_do = tl.zeros([C, C], tl.float32)
  for tile in range(TILES + zero):
    do_t = tl.trans(_tile(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN))
    F = _tile(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    U_do = tl.dot(F, do_t, U_do, input_precision=PRECISION)
    if RESIDUAL:
      F = _tile(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      W_do = tl.dot(F, do_t, W_do, input_precision=PRECISION)
  U_do *= beta[:, None]
  if RESIDUAL:
    U_do = tl.where(is_diagonal, 0.0, U_do) + gamma[:, None] * W_do * gamma[None, :]
  dscores_t = (U_do * decay_until(cumulative, era, C)).to(do_ptr.dtype.element_ty)

  # Keys on keys. dv falls out on the way.
  k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
  gram = tl.dot(k, tl.trans(k), input_precision=PRECISION)
  dgram = tl.zeros([C, C], tl.float32)
  for tile in range(TILES + zero):
    F = _tile(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dy = _tile(dy_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dgram = tl.dot(dy, tl.trans(F), dgram, input_precision=PRECISION)
    dv = beta[:, None] * dy.to(tl.float32)
    if RESIDUAL:
      dv += _tile(dinnovation_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN).to(tl.float32)
    columns = tile * BLOCK_V + e
    store_tile(
      dv_ptr + value_rows[:, None] + columns[None, :],
      dv.to(dy.dtype),
      is_token[:, None] & (columns < V)[None, :],
      EVEN,
    )
  dbeta = tl.sum(tl.where(is_diagonal, dgram, 0.0), 1)
  dG = tl.zeros([C], tl.float32)
  if RESIDUAL:
    between = tl.zeros([C, C], tl.float32)
    for tile in range(TILES + zero):
      dz = _tile(dz_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      F = _tile(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      between = tl.dot(dz, tl.trans(F), between, input_precision=PRECISION)
    dgamma = tl.sum(tl.where(is_diagonal, between, 0.0), 1)
  if DELTA:
    dgram *= beta[:, None] * beta[None, :]
    if RESIDUAL:
      dgram += gamma[:, None] * between * gamma[None, :]
    dgram *= -decay_between(cumulative, era, cumulative, era, False, C)
    flow = dgram * gram
    dG = tl.sum(flow, 1) - tl.sum(flow, 0)
  if RESIDUAL:
    between = tl.zeros([C, C], tl.float32)
    for tile in range(TILES + zero):
      dD = _tile(dinnovation_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      F = _tile(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      between = tl.dot(dD, tl.trans(F), between, input_precision=PRECISION)
    between *= -beta[None, :] * decay_between(before, era_before, cumulative, era, False, C)
    flow = between * gram
    dGx = tl.sum(flow, 1)
    dG -= tl.sum(flow, 0)
    dgram = dgram + between if DELTA else between
  if DELTA or RESIDUAL:
    dgram_low = (dgram + tl.trans(dgram)).to(k.dtype)

  # What the keys saw of the states as readers (dX, dY), then as writers (U, W).
  decay_in = tl.exp2(tl.where(era == 0, cumulative, float('-inf')))
  acc = tl.zeros([C, BLOCK_K], tl.float32)
  if RESIDUAL:
    decay_before = tl.exp2(tl.where(era_before == 0, before, float('-inf')))
    for tile in range(TILES + zero):
      dD = _tile(dinnovation_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      is_value = tile * BLOCK_V + e < V
      S = _tile(states_ptr, (tile * BLOCK_V + e) * K, a, 0, is_value, K, EVEN)
      acc = tl.dot(_scaled(-decay_before, dD), S, acc, input_precision=PRECISION)
    reads_before = _rows_dot(k_ptr + key_offsets, zero, acc, key_seen, EVEN)
    dGx += reads_before
    dG -= reads_before
  if DELTA:
    for tile in range(TILES + zero):
      dy = _tile(dy_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      is_value = tile * BLOCK_V + e < V
      S = _tile(states_ptr, (tile * BLOCK_V + e) * K, a, 0, is_value, K, EVEN)
      acc = tl.dot(_scaled(-decay_in * beta, dy), S, acc, input_precision=PRECISION)
      if RESIDUAL:
        dz = _tile(dz_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
        R = _tile(states_ptr + K * V, (tile * BLOCK_V + e) * K, a, 0, is_value, K, EVEN)
        acc = tl.dot(_scaled(-decay_in * gamma, dz), R, acc, input_precision=PRECISION)
  reads = _rows_dot(k_ptr + key_offsets, 2 * zero, acc, key_seen, EVEN)
  last = tl.sum(tl.where(i == C - 1, cumulative, 0.0), 0)
  last_era = tl.sum(tl.where(i == C - 1, era, 0), 0)
  decay_out = tl.exp2(tl.where(era == last_era, last - cumulative, float('-inf')))
  carried = tl.zeros([BLOCK_V], tl.float32)
  for tile in range(TILES + zero):
    F = _tile(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    is_value = tile * BLOCK_V + e < V
    state_rows = (tile * BLOCK_V + e) * K
    dS = _tile(dstates_ptr, state_rows, a, 0, is_value, K, EVEN)
    acc = tl.dot(_scaled(decay_out * beta, F), dS, acc, input_precision=PRECISION)
    S = _tile(states_ptr, state_rows, a, 0, is_value, K, EVEN)
    carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    if RESIDUAL:
      F = _tile(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dR = _tile(dstates_ptr + K * V, state_rows, a, 0, is_value, K, EVEN)
      acc = tl.dot(_scaled(decay_out * gamma, F), dR, acc, input_precision=PRECISION)
      R = _tile(states_ptr + K * V, state_rows, a, 0, is_value, K, EVEN)
      carried += tl.sum(R.to(tl.float32) * dR.to(tl.float32), 1)
  writes = _rows_dot(k_ptr + key_offsets, 3 * zero, acc, key_seen, EVEN) - reads
  decay_all = tl.sum(tl.where(i == C - 1, decay_in, 0.0), 0)
  closing = tl.sum(writes, 0) + decay_all * tl.sum(carried, 0)
  dG += reads - writes + tl.where(i == C - 1, closing, 0.0)
  if DELTA or RESIDUAL:
    k = load_tile(k_ptr + key_offsets + 4 * zero, key_seen, EVEN)
    acc = tl.dot(dgram_low, k, acc, input_precision=PRECISION)
  q = load_tile(q_ptr + key_offsets, key_seen, EVEN)
  acc = tl.dot(dscores_t, q, acc, input_precision=PRECISION)
  store_tile(dk_pointers, acc.to(q.dtype), key_seen, EVEN)
  return dbeta, dG, dGx, dgamma


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
  chunks,
  dq_ptr,
  dk_ptr,
  dv_ptr,
  dgates_ptr,
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
  """Grid (2 * chunks of the piece, B * H): a program for the queries, one for the keys.

  Pieces write to the same dq, dk, dv: the *_before arguments are their buffers, never read.
  dgates [B, tokens of the piece, 5, H]: log decay and gamma by each program, beta.
  """
  part = tl.program_id(0) % 2
  zero = (T >> 30) * 128  # a multiple keeps loads wide
  n = tl.program_id(0) // 2
  batch = tl.program_id(1) // H
  head = tl.program_id(1) % H
  start = (first_chunk + n) * C
  row = batch.to(tl.int64) * T
  pair = tl.program_id(1).to(tl.int64)
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  tokens = start + i
  is_token = tokens < T

  key_offsets = i[:, None] * (G * K) + a[None, :]
  keys = ((row + start) * G + head // (H // G)) * K
  q_ptr += keys
  k_ptr += keys
  value_rows = i * (H * V)
  values = ((row + start) * H + head) * V
  piece_values = ((batch.to(tl.int64) * chunks + n) * (C * H) + head) * V
  do_ptr += values
  base_error_ptr += values
  residual_error_ptr += values
  STATES: tl.constexpr = (1 + RESIDUAL) * K * V
  states_ptr += (pair * tl.cdiv(T, C) + first_chunk + n) * STATES
  dq_offsets = ((row + start) * H + head) * K + i[:, None] * (H * K) + a[None, :]

  gate_offsets = (row + tokens) * H + head
  beta = tl.load(beta_ptr + gate_offsets, mask=is_token, other=0.0)
  gamma = beta
  if RESIDUAL:
    gamma = tl.load(gamma_ptr + gate_offsets, mask=is_token, other=0.0)
  cumulative, before, era, era_before, is_reset = chunk_decays(
    log_decay_ptr, segments_ptr, batch, head, start, T, H, C, SEGMENTED
  )
  dgates = dgates_ptr + ((batch.to(tl.int64) * chunks + n) * C + i) * (5 * H) + head

  if part == 0:
    dG, dgamma = _queries(
      q_ptr, k_ptr, beta, gamma, cumulative, era, do_ptr, base_error_ptr, residual_error_ptr,
      states_ptr, key_offsets, value_rows, is_token, dq_ptr + dq_offsets, zero,
      K, V, C, BLOCK_K, BLOCK_V, RESIDUAL, EVEN, PRECISION,
    )  # fmt: skip
    # d log a_t: every dG from t on.
    dlog_decay = tl.sum(dG, 0) - tl.cumsum(dG, 0) + dG
    tl.store(dgates, tl.where(is_reset, 0.0, dlog_decay))
    tl.store(dgates + 2 * H, dgamma)
  else:
    dbeta, dG, dGx, dgamma = _keys(
      q_ptr, k_ptr, beta, gamma, cumulative, before, era, era_before, do_ptr, base_error_ptr,
      residual_error_ptr, states_ptr, dstates_ptr + (pair * chunks + n) * STATES,
      dy_ptr + piece_values, dz_ptr + piece_values, dinnovation_ptr + piece_values, key_offsets,
      value_rows, is_token, dk_ptr + dq_offsets, dv_ptr + values, zero,
      K, V, C, BLOCK_K, BLOCK_V, DELTA, RESIDUAL, EVEN, PRECISION,
    )  # fmt: skip
    # And every dGx after t, as Gx is G one token later.
    dlog_decay = tl.sum(dG + dGx, 0) - tl.cumsum(dG + dGx, 0) + dG
    tl.store(dgates + H, tl.where(is_reset, 0.0, dlog_decay))
    tl.store(dgates + 3 * H, dgamma)
    tl.store(dgates + 4 * H, dbeta)
