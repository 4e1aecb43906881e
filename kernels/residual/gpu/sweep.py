"""Backward, sequential part: walks the chunks from the end with both state gradients in registers.

Only what the next chunk waits for is computed here: equations of the adjoint from dW to dS0 and dR0.
What it learns (dS1, dR1, dy, dz, dD) is stored for `gradients`, which is parallel over chunks.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  BETA,
  DECAY_IN,
  DECAY_IN_BEFORE,
  DECAY_OUT,
  GAMMA,
  GATES,
  SELF,
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
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr,
  RESIDUAL: tl.constexpr,
  CLIP: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """Grid (value tiles, B * H); chunks first_chunk .. first_chunk + chunks - 1, backwards."""
  batch = tl.program_id(1) // H
  head = tl.program_id(1) % H
  row = batch.to(tl.int64) * T
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
  key_offsets = i[:, None] * (G * K) + a[None, :]
  value_offsets = i[:, None] * (H * V) + e[None, :]
  square_offsets = i[:, None] * C + i[None, :]
  state_offsets = a[:, None] * V + e[None, :]
  state_seen = (a < K)[:, None] & (e < V)[None, :]
  pair = tl.program_id(1).to(tl.int64)

  dS = tl.load(dbase_in_ptr + pair * (K * V) + state_offsets, mask=state_seen, other=0.0)
  if RESIDUAL:
    dR = tl.load(dresidual_in_ptr + pair * (K * V) + state_offsets, mask=state_seen, other=0.0)
  dtype = do_ptr.dtype.element_ty
  COUNT: tl.constexpr = 1 + DELTA + RESIDUAL + (DELTA and RESIDUAL)

  for step in range(chunks):
    n = chunks - 1 - step
    start = (first_chunk + n) * C
    keys = ((row + start) * G + head // (H // G)) * K
    values = ((row + start) * H + head) * V
    piece_values = (((batch.to(tl.int64) * chunks + n) * C) * H + head) * V
    chunk = pair * chunks + n
    if EVEN:
      k = tl.load(k_ptr + keys + key_offsets)
      q = tl.load(q_ptr + keys + key_offsets)
      do = tl.load(do_ptr + values + value_offsets)
    else:
      is_token = (start + i < T)[:, None]
      value_seen = is_token & (e < V)[None, :]
      k = tl.load(k_ptr + keys + key_offsets, mask=is_token & (a < K)[None, :], other=0.0)
      q = tl.load(q_ptr + keys + key_offsets, mask=is_token & (a < K)[None, :], other=0.0)
      do = tl.load(do_ptr + values + value_offsets, mask=value_seen, other=0.0)
    square = matrices_ptr + chunk * (COUNT * C * C) + square_offsets
    gates = gates_ptr + chunk * (ROWS * C)
    decay_in = tl.load(gates + DECAY_IN * C + i)[:, None]
    decay_out = tl.load(gates + DECAY_OUT * C + i)[:, None]
    decay_all = tl.load(gates + DECAY_IN * C + C - 1)
    scores_t = tl.trans(tl.load(square))
    do_wide = do.to(tl.float32)

    dS_low = dS.to(dtype)
    saved = dstates_ptr + chunk * ((1 + RESIDUAL) * K * V) + state_offsets
    if EVEN:
      tl.store(saved, dS_low)
    else:
      tl.store(saved, dS_low, mask=state_seen)
    dU = decay_out * tl.dot(k, dS_low, input_precision=PRECISION)
    dU = tl.dot(scores_t, do, dU, input_precision=PRECISION)
    if RESIDUAL:
      gamma = tl.load(gates + GAMMA * C + i)[:, None]
      decay_in_before = tl.load(gates + DECAY_IN_BEFORE * C + i)[:, None]
      dU -= tl.load(gates + SELF * C + i)[:, None] * do_wide
      dR_low = dR.to(dtype)
      if EVEN:
        tl.store(saved + K * V, dR_low)
      else:
        tl.store(saved + K * V, dR_low, mask=state_seen)
      dz = decay_out * tl.dot(k, dR_low, input_precision=PRECISION)
      dz = tl.dot(scores_t, (gamma * do_wide).to(dtype), dz, input_precision=PRECISION)
      if DELTA:
        inverse_t = tl.trans(tl.load(square + 3 * C * C))
        dz = tl.dot(inverse_t, dz.to(dtype), input_precision=PRECISION)
      d_innovation = gamma * dz
      if CLIP is not None:
        if EVEN:
          passes = tl.load(passes_ptr + values + value_offsets)
        else:
          passes = tl.load(passes_ptr + values + value_offsets, mask=value_seen, other=0)
        d_innovation = tl.where(passes != 0, d_innovation, 0.0)
      d_prediction = (-d_innovation).to(dtype)
      prediction_t = tl.trans(tl.load(square + (1 + DELTA) * C * C))
      if EVEN:
        tl.store(dz_ptr + piece_values + value_offsets, dz.to(dtype))
        tl.store(dinnovation_ptr + piece_values + value_offsets, d_innovation.to(dtype))
      else:
        tl.store(dz_ptr + piece_values + value_offsets, dz.to(dtype), mask=value_seen)
        tl.store(
          dinnovation_ptr + piece_values + value_offsets, d_innovation.to(dtype), mask=value_seen
        )
      dR = tl.dot(
        tl.trans(q),
        (decay_in * gamma * do_wide).to(dtype),
        decay_all * dR,
        input_precision=PRECISION,
      )
      if DELTA:
        dR = tl.dot(
          tl.trans(k), (-decay_in * gamma * dz).to(dtype), dR, input_precision=PRECISION
        )
    if DELTA:
      dy = tl.dot(tl.trans(tl.load(square + C * C)), dU.to(dtype), input_precision=PRECISION)
    else:
      dy = dU
    if RESIDUAL:
      dy = tl.dot(prediction_t, d_prediction, dy, input_precision=PRECISION)
    if EVEN:
      tl.store(dy_ptr + piece_values + value_offsets, dy.to(dtype))
    else:
      tl.store(dy_ptr + piece_values + value_offsets, dy.to(dtype), mask=value_seen)
    dS = tl.dot(
      tl.trans(q), (decay_in * do_wide).to(dtype), decay_all * dS, input_precision=PRECISION
    )
    if DELTA:
      beta = tl.load(gates + BETA * C + i)[:, None]
      dX = -decay_in * beta * dy
      if RESIDUAL:
        dX -= decay_in_before * d_innovation
      dS = tl.dot(tl.trans(k), dX.to(dtype), dS, input_precision=PRECISION)
    elif RESIDUAL:
      dX = -decay_in_before * d_innovation
      dS = tl.dot(tl.trans(k), dX.to(dtype), dS, input_precision=PRECISION)

  tl.store(dbase_ptr + pair * (K * V) + state_offsets, dS, mask=state_seen)
  if RESIDUAL:
    tl.store(dresidual_ptr + pair * (K * V) + state_offsets, dR, mask=state_seen)
