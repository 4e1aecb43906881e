"""Kernel B: walks the chunks of one head and value tile with both states in registers."""

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
def forward_kernel(
  q_ptr,
  k_ptr,
  v_ptr,
  matrices_ptr,
  gates_ptr,
  base_ptr,
  residual_ptr,
  T,
  o_ptr,
  base_out_ptr,
  residual_out_ptr,
  states_ptr,
  base_error_ptr,
  residual_error_ptr,
  passes_ptr,
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
  SAVE: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """Grid (value tiles, B * H). Letters as in the chunk form: F = U / b, or W / g."""
  batch = tl.program_id(1) // H
  head = tl.program_id(1) % H
  chunks = tl.cdiv(T, C)
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

  S = tl.load(base_ptr + pair * (K * V) + state_offsets, mask=state_seen, other=0.0)
  if RESIDUAL:
    R = tl.load(residual_ptr + pair * (K * V) + state_offsets, mask=state_seen, other=0.0)
  dtype = o_ptr.dtype.element_ty
  COUNT: tl.constexpr = 1 + DELTA + RESIDUAL + (DELTA and RESIDUAL)

  for n in range(chunks):
    start = n * C
    keys = ((row + start) * G + head // (H // G)) * K
    values = ((row + start) * H + head) * V
    chunk = pair * chunks + n
    if EVEN:
      k = tl.load(k_ptr + keys + key_offsets)
      q = tl.load(q_ptr + keys + key_offsets)
      v = tl.load(v_ptr + values + value_offsets)
    else:
      is_token = (start + i < T)[:, None]
      value_seen = is_token & (e < V)[None, :]
      k = tl.load(k_ptr + keys + key_offsets, mask=is_token & (a < K)[None, :], other=0.0)
      q = tl.load(q_ptr + keys + key_offsets, mask=is_token & (a < K)[None, :], other=0.0)
      v = tl.load(v_ptr + values + value_offsets, mask=value_seen, other=0.0)
    square = matrices_ptr + chunk * (COUNT * C * C) + square_offsets
    gates = gates_ptr + chunk * (ROWS * C)
    decay_in = tl.load(gates + DECAY_IN * C + i)[:, None]
    decay_out = tl.load(gates + DECAY_OUT * C + i)[:, None]
    beta = tl.load(gates + BETA * C + i)[:, None]
    decay_all = tl.load(gates + DECAY_IN * C + C - 1)
    scores = tl.load(square)

    S_low = S.to(dtype)
    if SAVE:
      saved = states_ptr + chunk * ((1 + RESIDUAL) * K * V) + state_offsets
      if EVEN:
        tl.store(saved, S_low)
      else:
        tl.store(saved, S_low, mask=state_seen)
    X = tl.dot(k, S_low, input_precision=PRECISION)
    if RESIDUAL:
      R_low = R.to(dtype)
      if SAVE:
        if EVEN:
          tl.store(saved + K * V, R_low)
        else:
          tl.store(saved + K * V, R_low, mask=state_seen)
      Y = tl.dot(k, R_low, input_precision=PRECISION)
    if DELTA:
      y = (v.to(tl.float32) - decay_in * X).to(dtype)
      F = tl.dot(tl.load(square + C * C), y, input_precision=PRECISION)
      if SAVE:
        if EVEN:
          tl.store(base_error_ptr + values + value_offsets, F.to(dtype))
        else:
          tl.store(base_error_ptr + values + value_offsets, F.to(dtype), mask=value_seen)
    else:
      F = v.to(tl.float32)
    U = beta * F
    U_low = U.to(dtype)
    o = decay_in * tl.dot(q, S_low, input_precision=PRECISION)
    o = tl.dot(scores, U_low, o, input_precision=PRECISION)
    S = tl.dot(
      tl.trans(k), (decay_out * U).to(dtype), decay_all * S, input_precision=PRECISION
    )
    if RESIDUAL:
      gamma = tl.load(gates + GAMMA * C + i)[:, None]
      decay_in_before = tl.load(gates + DECAY_IN_BEFORE * C + i)[:, None]
      # The base read-out leaves out the current token, which the score matrix holds.
      o -= tl.load(gates + SELF * C + i)[:, None] * U_low.to(tl.float32)
      prediction = tl.load(square + (1 + DELTA) * C * C)
      inside = tl.dot(prediction, y if DELTA else U_low, input_precision=PRECISION)
      r = v.to(tl.float32) - decay_in_before * X - inside
      if CLIP is not None:
        if SAVE:
          passes = (tl.abs(r) < CLIP).to(tl.int8)
          if EVEN:
            tl.store(passes_ptr + values + value_offsets, passes)
          else:
            tl.store(passes_ptr + values + value_offsets, passes, mask=value_seen)
        r = tl.minimum(tl.maximum(r, -CLIP), CLIP)
      if DELTA:
        y = (r - decay_in * Y).to(dtype)
        F = tl.dot(tl.load(square + 3 * C * C), y, input_precision=PRECISION)
      else:
        F = r
      if SAVE:
        if EVEN:
          tl.store(residual_error_ptr + values + value_offsets, F.to(dtype))
        else:
          tl.store(residual_error_ptr + values + value_offsets, F.to(dtype), mask=value_seen)
      W = gamma * F
      read = decay_in * tl.dot(q, R_low, input_precision=PRECISION)
      read = tl.dot(scores, W.to(dtype), read, input_precision=PRECISION)
      o += gamma * read
      R = tl.dot(
        tl.trans(k), (decay_out * W).to(dtype), decay_all * R, input_precision=PRECISION
      )
    if EVEN:
      tl.store(o_ptr + values + value_offsets, o.to(dtype))
    else:
      tl.store(o_ptr + values + value_offsets, o.to(dtype), mask=value_seen)

  tl.store(base_out_ptr + pair * (K * V) + state_offsets, S, mask=state_seen)
  if RESIDUAL:
    tl.store(residual_out_ptr + pair * (K * V) + state_offsets, R, mask=state_seen)
