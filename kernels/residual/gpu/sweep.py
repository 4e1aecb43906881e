"""Backward, sequential part: walks the chunks from the end with both state gradients in registers.

Only what the next chunk waits for is computed here: the adjoint from dW to dS0 and dR0. What it
learns (dS1, dR1, dy, dz, dD) is stored for `gradients`, which is parallel over chunks. Transposed
like `forward`, for the same reason.
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
  RESIDUAL_OUT,
  RESIDUAL_READ,
  load_tile,
  store_tile,
)

ROWS = tl.constexpr(GATES)


@triton.jit
def sweep_kernel(
  q_ptr,
  k_ptr,
  do_ptr,
  matrices_ptr,
  gates_ptr,
  passes_ptr,
  dbase_in_ptr,
  dresidual_in_ptr,
  T,
  first_chunk,
  chunks,
  dstates_ptr,
  dy_ptr,
  dz_ptr,
  dinnovation_ptr,
  dbase_ptr,
  dresidual_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr,
  RESIDUAL: tl.constexpr,
  CLIP: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """Grid (value tiles, B * H); chunks first_chunk .. first_chunk + chunks - 1, backwards.

  The state gradients after every SPAN-th chunk are kept.
  """
  batch = tl.program_id(1) // H
  head = tl.program_id(1) % H
  row = batch.to(tl.int64) * T
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
  key_offsets = i[:, None] * (G * K) + a[None, :]
  value_offsets = i[:, None] * (H * V) + e[None, :]
  square_offsets = i[:, None] * C + i[None, :]
  state_offsets = a[None, :] * V + e[:, None]
  saved_offsets = e[:, None] * K + a[None, :]
  state_seen = (a < K)[None, :] & (e < V)[:, None]
  pair = tl.program_id(1).to(tl.int64)

  dS = tl.load(dbase_in_ptr + pair * (K * V) + state_offsets, mask=state_seen, other=0.0)
  if RESIDUAL:
    dR = tl.load(dresidual_in_ptr + pair * (K * V) + state_offsets, mask=state_seen, other=0.0)
  dtype = do_ptr.dtype.element_ty
  COUNT: tl.constexpr = 1 + DELTA + 2 * RESIDUAL + (DELTA and RESIDUAL)

  for step in range(chunks):
    n = chunks - 1 - step
    start = (first_chunk + n) * C
    keys = ((row + start) * G + head // (H // G)) * K
    values = ((row + start) * H + head) * V
    piece_values = (((batch.to(tl.int64) * chunks + n) * C) * H + head) * V
    chunk = pair * chunks + n
    is_token = (start + i < T)[:, None]
    key_seen = is_token & (a < K)[None, :]
    value_seen = is_token & (e < V)[None, :]
    k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
    q = load_tile(q_ptr + keys + key_offsets, key_seen, EVEN)
    do = tl.trans(load_tile(do_ptr + values + value_offsets, value_seen, EVEN))
    square = matrices_ptr + chunk * (COUNT * C * C) + square_offsets
    gates = gates_ptr + chunk * (ROWS * C)
    decay_all = tl.load(gates + BASE_IN * C + C - 1)
    do_wide = do.to(tl.float32)

    dS_low = dS.to(dtype)
    if n % SPAN == SPAN - 1:
      saved = dstates_ptr + (pair * (chunks // SPAN) + n // SPAN) * ((1 + RESIDUAL) * K * V)
      store_tile(saved + saved_offsets, dS_low, state_seen, EVEN)
      if RESIDUAL:
        store_tile(saved + K * V + saved_offsets, dR.to(dtype), state_seen, EVEN)
    if RESIDUAL:
      residual_square = square + (1 + DELTA) * C * C
      dz = tl.dot(dR.to(dtype), tl.trans(k), input_precision=PRECISION)
      dz *= tl.load(gates + RESIDUAL_OUT * C + i)[None, :]
      dz = tl.dot(do, tl.load(residual_square), dz, input_precision=PRECISION)
      if DELTA:
        inverse = tl.load(residual_square + 2 * C * C)
        dz = tl.dot(dz.to(dtype), inverse, input_precision=PRECISION)
      store_tile(
        dz_ptr + piece_values + value_offsets, tl.trans(dz.to(dtype)), value_seen, EVEN
      )
      read = tl.load(gates + RESIDUAL_READ * C + i)[None, :]
      dR = tl.dot((read * do_wide).to(dtype), q, decay_all * dR, input_precision=PRECISION)
      if DELTA:
        dR = tl.dot((-read * dz).to(dtype), k, dR, input_precision=PRECISION)
      d_innovation = tl.load(gates + GAMMA * C + i)[None, :] * dz
      if CLIP is not None:
        passes = tl.trans(load_tile(passes_ptr + values + value_offsets, value_seen, EVEN))
        d_innovation = tl.where(passes != 0, d_innovation, 0.0)
      store_tile(
        dinnovation_ptr + piece_values + value_offsets,
        tl.trans(d_innovation.to(dtype)),
        value_seen,
        EVEN,
      )
    dy = tl.dot(dS_low, tl.trans(k), input_precision=PRECISION)
    dy *= tl.load(gates + BASE_OUT * C + i)[None, :]
    dy = tl.dot(do, tl.load(square), dy, input_precision=PRECISION)
    if DELTA:
      dy = tl.dot(dy.to(dtype), tl.load(square + C * C), input_precision=PRECISION)
    if RESIDUAL:
      prediction = tl.load(residual_square + C * C)
      dy = tl.dot((-d_innovation).to(dtype), prediction, dy, input_precision=PRECISION)
    store_tile(dy_ptr + piece_values + value_offsets, tl.trans(dy.to(dtype)), value_seen, EVEN)
    read = (tl.load(gates + BASE_IN * C + i)[None, :] * do_wide).to(dtype)
    dS = tl.dot(read, q, decay_all * dS, input_precision=PRECISION)
    if DELTA:
      dX = tl.load(gates + BASE_READ * C + i)[None, :] * dy
      if RESIDUAL:
        dX += tl.load(gates + BASE_BEFORE * C + i)[None, :] * d_innovation
      dS = tl.dot((-dX).to(dtype), k, dS, input_precision=PRECISION)
    elif RESIDUAL:
      dX = tl.load(gates + BASE_BEFORE * C + i)[None, :] * d_innovation
      dS = tl.dot((-dX).to(dtype), k, dS, input_precision=PRECISION)

  # Offsets of their own: those of the loads would stay in registers throughout the loop.
  state_offsets = pair * (K * V) + a[:, None] * V + e[None, :]
  state_seen = (a < K)[:, None] & (e < V)[None, :]
  tl.store(dbase_ptr + state_offsets, tl.trans(dS), mask=state_seen)
  if RESIDUAL:
    tl.store(dresidual_ptr + state_offsets, tl.trans(dR), mask=state_seen)
