"""Backward, parallel part, first half: gradients of the queries of one chunk from stored pieces.

What the scores of queries and keys give to the keys, and to the gates, is left for `keys`.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  chunk_decays,
  decay_between,
  decay_in,
  load_columns,
  load_decays,
  load_state,
  load_tile,
  store_tile,
)


@triton.jit
def queries_kernel(
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
  dq_before_ptr,
  dlog_decay_before_ptr,
  dgamma_before_ptr,
  T,
  first_chunk,
  chunks,
  dq_ptr,
  dscores_ptr,
  dlog_decay_ptr,
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

  Pieces write to the same dq, and what this finds of the gates' gradients, which `keys` completes,
  to the same dlog_decay (of the sums of log decays so far) and dgamma. The *_before arguments are
  their buffers, never read.
  """
  pair = (tl.program_id(0) // chunks).to(tl.int64)
  n = tl.program_id(0) % chunks
  batch = pair // H
  head = pair % H
  start = (first_chunk + n) * C
  row = batch * T
  dtype = do_ptr.dtype.element_ty
  # T >> 30 is 0, which the compiler cannot know: unrolled, the loops would not fit the registers.
  # Loops that are told their stages prefetch all loads, not only those of products.
  tiles = (V + BLOCK_V - 1) // BLOCK_V + (T >> 30)

  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  is_token = start + i < T
  value_rows = i * (H * V)
  values = ((row + start) * H + head) * V
  do_ptr += values
  base_error_ptr += values
  residual_error_ptr += values
  state = (pair * tl.cdiv(T, C) + first_chunk + n) * (K * V)
  states_ptr += state
  residual_states_ptr += state
  keys = ((row + start) * G + head // (H // G)) * K
  q_ptr += keys
  k_ptr += keys
  gates = (row + start) * H + head
  key_seen = is_token[:, None] & (a < K)[None, :]
  key_offsets = i[:, None] * (G * K) + a[None, :]
  q = load_tile(q_ptr + key_offsets, key_seen, EVEN)
  k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
  decays = load_decays(log_decay_ptr, segments_ptr, batch, head, start, T, i, H, SEGMENTED)
  beta = tl.load(beta_ptr + gates + i * H, mask=is_token, other=0.0)
  if RESIDUAL:
    gamma = tl.load(gamma_ptr + gates + i * H, mask=is_token, other=0.0)
  cumulative, _, era, _, _ = chunk_decays(*decays, SEGMENTED)

  # Inside the chunk. Tiles are loaded again where they are needed again: held in registers they
  # would not leave room for the products.
  dscores = tl.zeros([C, C], tl.float32)
  do_W = tl.zeros([C, C], tl.float32)
  for tile in tl.range(tiles, num_stages=STAGES + 2):
    do = load_columns(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    F = load_columns(base_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    dscores = tl.dot(do, tl.trans(F), dscores, input_precision=PRECISION)
    if RESIDUAL:
      F = load_columns(residual_error_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      do_W = tl.dot(do, tl.trans(F), do_W, input_precision=PRECISION)
  L = decay_between(cumulative, era, cumulative, era, True, C)
  dscores *= beta[None, :] * L
  if RESIDUAL:
    do_W *= gamma[None, :] * L
  scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
  if RESIDUAL:
    dgamma = tl.sum(scores * do_W, 1)
    is_diagonal = i[:, None] == i[None, :]
    dscores = tl.where(is_diagonal, 0.0, dscores) + gamma[:, None] * do_W
  flow = dscores * scores
  dG = tl.sum(flow, 1) - tl.sum(flow, 0)
  dscores_low = dscores.to(dtype)
  square = (pair * chunks + n) * (C * C) + i[:, None] * C + i[None, :]
  tl.store(dscores_ptr + square, dscores_low)

  # What the queries saw of the states. These enter as they are stored, [V, K].
  from_start = decay_in(cumulative, era)
  dq = tl.zeros([C, BLOCK_K], tl.float32)
  q = load_tile(q_ptr + key_offsets, key_seen, EVEN)
  if RESIDUAL:
    for tile in tl.range(tiles, num_stages=STAGES + 2):
      do = load_columns(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
      R = load_state(residual_states_ptr, tile * BLOCK_V + e, a, K, V, EVEN)
      dq = tl.dot(do, R, dq, input_precision=PRECISION)
    dgamma += from_start * tl.sum(q.to(tl.float32) * dq, 1)
    dq *= gamma[:, None]
  for tile in tl.range(tiles, num_stages=STAGES + 2):
    do = load_columns(do_ptr, value_rows, e, tile * BLOCK_V, is_token, V, EVEN)
    S = load_state(states_ptr, tile * BLOCK_V + e, a, K, V, EVEN)
    dq = tl.dot(do, S, dq, input_precision=PRECISION)
  dq *= from_start[:, None]
  dG += tl.sum(q.to(tl.float32) * dq, 1)
  k = load_tile(k_ptr + key_offsets, key_seen, EVEN)
  dq = tl.dot(dscores_low, k, dq, input_precision=PRECISION)
  if DELTA and dtype != tl.float32:
    rest = (dscores - dscores_low.to(tl.float32)).to(dtype)
    dq = tl.dot(rest, k, dq, input_precision=PRECISION)
  dq_offsets = gates * K + i[:, None] * (H * K) + a[None, :]
  store_tile(dq_ptr + dq_offsets, dq.to(dtype), key_seen, EVEN)

  store_tile(dlog_decay_ptr + gates + i * H, dG, is_token, EVEN)
  if RESIDUAL:
    store_tile(dgamma_ptr + gates + i * H, dgamma, is_token, EVEN)
