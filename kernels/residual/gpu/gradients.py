"""Backward, parallel part: gradients of q, k, v and the gates of one chunk from stored pieces."""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  chunk_decays,
  decay_between,
  decay_in,
  decay_out,
  fresh,
  load_columns,
  load_decays,
  load_tile,
  scaled,
  store_tile,
)


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
  residual_states_ptr,
  dstates_ptr,
  residual_dstates_ptr,
  dy_ptr,
  dz_ptr,
  dprediction_ptr,
  dq_before_ptr,
  dk_before_ptr,
  dv_before_ptr,
  T,
  first_chunk,
  chunks,
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
  STAGES: tl.constexpr,
):
  """One chunk of one head. Grid (B * H * chunks of the piece,).

  Pieces write to the same dq, dk, dv: the *_before arguments are their buffers, never read.
  """
  pair = (tl.program_id(0) // chunks).to(tl.int64)
  n = tl.program_id(0) % chunks
  batch = pair // H
  head = pair % H
  total_chunks = tl.cdiv(T, C)
  start = (first_chunk + n) * C
  row = batch * T
  dtype = do_ptr.dtype.element_ty
  # T >> 30 is 0, which the compiler cannot know: unrolled, the loops would not fit the registers.
  # Loops that are told their stages prefetch all loads, not only those of products.
  # Those of few tiles have shared memory for two stages more.
  tiles = (V + BLOCK_V - 1) // BLOCK_V + (T >> 30)

  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  is_token = start + i < T
  is_key = a < K
  value_rows = i * (H * V)
  values = ((row + start) * H + head) * V
  piece_values = ((batch * chunks + n) * C * H + head) * V
  do_ptr += values
  base_error_ptr += values
  residual_error_ptr += values
  dv_ptr += values
  dy_ptr += piece_values
  dz_ptr += piece_values
  dprediction_ptr += piece_values
  state = (pair * total_chunks + first_chunk + n) * (K * V)
  states_ptr += state
  residual_states_ptr += state
  dstate = (pair * chunks + n) * (K * V)
  dstates_ptr += dstate
  residual_dstates_ptr += dstate
  keys = ((row + start) * G + head // (H // G)) * K
  q_ptr += keys
  k_ptr += keys
  beta_ptr += (row + start) * H + head
  gamma_ptr += (row + start) * H + head
  out_keys = ((row + start) * H + head) * K
  dq_ptr += out_keys
  dk_ptr += out_keys
  out_gates = (batch * chunks + n) * C * H + head

  key_seen = is_token[:, None] & is_key[None, :]
  key_offsets = i[:, None] * (G * K) + a[None, :]
  dq_offsets = i[:, None] * (H * K) + a[None, :]
  q = load_tile(q_ptr + key_offsets, key_seen, EVEN)
  k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
  decays = load_decays(log_decay_ptr, segments_ptr, batch, head, start, T, i, H, SEGMENTED)
  beta = tl.load(beta_ptr + i * H, mask=is_token, other=0.0)
  if RESIDUAL:
    gamma = tl.load(gamma_ptr + i * H, mask=is_token, other=0.0)
  cumulative, before, era, era_before, is_reset = chunk_decays(*decays, SEGMENTED)
  is_diagonal = i[:, None] == i[None, :]

  # Inside the chunk, queries on keys. Tiles are loaded again where they are needed again: held
  # in registers they would not leave room for the products.
  dscores = tl.zeros([C, C], tl.float32)
  do_W = tl.zeros([C, C], tl.float32)
  for tile in tl.range(tiles, num_stages=STAGES + 2):
    do = load_columns(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    F = load_columns(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dscores = tl.dot(do, tl.trans(F), dscores, input_precision=PRECISION)
    if RESIDUAL:
      F = load_columns(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
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
  dscores *= L
  dscores_low = dscores.to(dtype)

  from_start = decay_in(cumulative, era)
  # dq: what the queries saw of the states. These enter as they are stored, [V, K].
  acc = tl.zeros([C, BLOCK_K], tl.float32)
  q = load_tile(q_ptr + key_offsets, key_seen, EVEN)
  if RESIDUAL:
    for tile in tl.range(tiles, num_stages=STAGES + 2):
      do = load_columns(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      state_rows = (tile * BLOCK_V + e) * K
      is_value = tile * BLOCK_V + e < V
      R = load_columns(residual_states_ptr, state_rows, a, 0, is_value, K, EVEN)
      acc = tl.dot(do, R, acc, input_precision=PRECISION)
    dgamma += from_start * tl.sum(q.to(tl.float32) * acc, 1)
    acc *= gamma[:, None]
  for tile in tl.range(tiles, num_stages=STAGES + 2):
    do = load_columns(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    state_rows = (tile * BLOCK_V + e) * K
    is_value = tile * BLOCK_V + e < V
    S = load_columns(states_ptr, state_rows, a, 0, is_value, K, EVEN)
    acc = tl.dot(do, S, acc, input_precision=PRECISION)
  acc *= from_start[:, None]
  dG += tl.sum(q.to(tl.float32) * acc, 1)
  k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
  acc = tl.dot(dscores_low, k, acc, input_precision=PRECISION)
  if DELTA and dtype != tl.float32:
    rest = (dscores - dscores_low.to(tl.float32)).to(dtype)
    acc = tl.dot(rest, k, acc, input_precision=PRECISION)
  store_tile(dq_ptr + dq_offsets, acc.to(dtype), key_seen, EVEN)

  # Keys on keys. dv falls out on the way. Gates are read again rather than kept: what is kept
  # over a phase is spilled, right behind its load, which nothing then can hide.
  if RESIDUAL:
    t = fresh(i, T)
    decays = load_decays(log_decay_ptr, segments_ptr, batch, head, start, T, t, H, SEGMENTED)
    beta = tl.load(beta_ptr + t * H, mask=start + t < T, other=0.0)
    gamma = tl.load(gamma_ptr + t * H, mask=start + t < T, other=0.0)
  dgram = tl.zeros([C, C], tl.float32)
  dp_F = tl.zeros([C, C], tl.float32)
  dz_F = tl.zeros([C, C], tl.float32)
  for tile in tl.range(tiles, num_stages=STAGES):
    F = load_columns(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dy = load_columns(dy_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dgram = tl.dot(dy, tl.trans(F), dgram, input_precision=PRECISION)
    dv = beta[:, None] * dy.to(tl.float32)
    if RESIDUAL:
      dp = load_columns(dprediction_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dp_F = tl.dot(dp, tl.trans(F), dp_F, input_precision=PRECISION)
      dv -= dp.to(tl.float32)
      dz = load_columns(dz_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      F = load_columns(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dz_F = tl.dot(dz, tl.trans(F), dz_F, input_precision=PRECISION)
    columns = tile * BLOCK_V + e
    store_tile(
      dv_ptr + value_rows[:, None] + columns[None, :],
      dv.to(dtype),
      is_token[:, None] & (columns < V)[None, :],
      EVEN,
    )
  out_offsets = out_gates + fresh(i, T) * H
  tl.store(dbeta_ptr + out_offsets, tl.sum(tl.where(is_diagonal, dgram, 0.0), 1))
  if RESIDUAL:
    dgamma += tl.sum(tl.where(is_diagonal, dz_F, 0.0), 1)
    tl.store(dgamma_ptr + out_offsets, dgamma)
    cumulative, before, era, era_before, is_reset = chunk_decays(*decays, SEGMENTED)
  if DELTA or RESIDUAL:
    k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
    gram = tl.dot(k, tl.trans(k), input_precision=PRECISION)
  if DELTA:
    dgram *= beta[:, None] * beta[None, :]
    if RESIDUAL:
      dgram += gamma[:, None] * dz_F * gamma[None, :]
    dgram = -dgram * decay_between(cumulative, era, cumulative, era, False, C)
    dG += tl.sum(dgram * gram, 1)
  if RESIDUAL:
    Lx = decay_between(before, era_before, cumulative, era, False, C)
    dp_F *= beta[None, :] * Lx
    dGx = tl.sum(dp_F * gram, 1)
    dgram = dgram + dp_F if DELTA else dp_F
  if DELTA or RESIDUAL:
    dG -= tl.sum(dgram * gram, 0)
  dgram_low = dgram.to(dtype)

  # dk: what the keys saw of the states as readers (dX, dY), then as writers (U, W).
  acc = tl.zeros([C, BLOCK_K], tl.float32)
  k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
  if RESIDUAL:
    from_start = decay_in(cumulative, era)
    decay_before = decay_in(before, era_before)
    for tile in tl.range(tiles, num_stages=STAGES + 2):
      dp = load_columns(dprediction_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      state_rows = (tile * BLOCK_V + e) * K
      is_value = tile * BLOCK_V + e < V
      S = load_columns(states_ptr, state_rows, a, 0, is_value, K, EVEN)
      acc = tl.dot(scaled(decay_before, dp), S, acc, input_precision=PRECISION)
    before_read = tl.sum(k.to(tl.float32) * acc, 1)
    dGx += before_read
    dG -= before_read
  if DELTA:
    for tile in tl.range(tiles, num_stages=STAGES):
      dy = load_columns(dy_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      state_rows = (tile * BLOCK_V + e) * K
      is_value = tile * BLOCK_V + e < V
      S = load_columns(states_ptr, state_rows, a, 0, is_value, K, EVEN)
      acc = tl.dot(scaled(-from_start * beta, dy), S, acc, input_precision=PRECISION)
      if RESIDUAL:
        dz = load_columns(dz_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
        R = load_columns(residual_states_ptr, state_rows, a, 0, is_value, K, EVEN)
        acc = tl.dot(scaled(-from_start * gamma, dz), R, acc, input_precision=PRECISION)
  if DELTA or RESIDUAL:
    reads = tl.sum(k.to(tl.float32) * acc, 1)
    dG += reads
  to_end = decay_out(cumulative, era, C)
  carried = tl.zeros([BLOCK_V, BLOCK_V], tl.float32)  # its diagonal counts
  for tile in tl.range(tiles, num_stages=STAGES):
    F = load_columns(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    state_rows = (tile * BLOCK_V + e) * K
    is_value = tile * BLOCK_V + e < V
    dS = load_columns(dstates_ptr, state_rows, a, 0, is_value, K, EVEN)
    acc = tl.dot(scaled(to_end * beta, F), dS, acc, input_precision=PRECISION)
    S = load_columns(states_ptr, state_rows, a, 0, is_value, K, EVEN)
    carried = tl.dot(S, tl.trans(dS), carried, input_precision=PRECISION)
  # A loop of its own: the shared memory of both together would leave one program a multiprocessor.
  if RESIDUAL:
    for tile in tl.range(tiles, num_stages=STAGES):
      state_rows = (tile * BLOCK_V + e) * K
      is_value = tile * BLOCK_V + e < V
      F = load_columns(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      dS = load_columns(residual_dstates_ptr, state_rows, a, 0, is_value, K, EVEN)
      acc = tl.dot(scaled(to_end * gamma, F), dS, acc, input_precision=PRECISION)
      S = load_columns(residual_states_ptr, state_rows, a, 0, is_value, K, EVEN)
      carried = tl.dot(S, tl.trans(dS), carried, input_precision=PRECISION)
  writes = tl.sum(k.to(tl.float32) * acc, 1)
  if DELTA or RESIDUAL:
    writes -= reads
  decay_all = tl.sum(tl.where(i == C - 1, from_start, 0.0), 0)
  carried = tl.sum(tl.where(e[:, None] == e[None, :], carried, 0.0), 1)
  closing = tl.sum(writes, 0) + decay_all * tl.sum(carried, 0)
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
