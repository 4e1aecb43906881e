"""Kernel B: walks the chunks of one head and value tile with a state in registers.

Both states advance in the same launch. A program leads with the base state and hands the clipped
residual on; its follower carries the residual state a few chunks behind. Two states in one program
do not fit the registers, and the two chains of products run side by side this way.

States and all products with them are held transposed, [values, keys] and [values, tokens]: then the
left operand of every product on the dependent chain comes out of registers as it is, as in flash
attention, and no chunk waits for shared memory between its products.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  BASE_BEFORE,
  BASE_IN,
  BASE_OUT,
  GATES,
  RESIDUAL_IN,
  RESIDUAL_OUT,
  RESIDUAL_READ,
  announce,
  await_progress,
  load_tile,
  role,
  store_tile,
)

ROWS = tl.constexpr(GATES)


@triton.jit
def _base(
  q_ptr, k_ptr, v_ptr, matrices_ptr, gates_ptr, initial_ptr, progress_ptr, T, chunks,
  o_ptr, final_ptr, states_ptr, error_ptr, r_ptr, passes_ptr, tile, pair,
  H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
  SPAN: tl.constexpr, BURST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr, RESIDUAL: tl.constexpr, CLIP: tl.constexpr, SAVE: tl.constexpr,
  EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """S: equations (6), (7), the base part of (9), and (10). F = U / b."""
  head = (pair % H).to(tl.int32)
  row = pair // H * T
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tile * BLOCK_V + tl.arange(0, BLOCK_V)
  key_offsets = i[:, None] * (G * K) + a[None, :]
  value_offsets = i[:, None] * (H * V) + e[None, :]
  square_offsets = i[:, None] * C + i[None, :]
  saved_offsets = e[:, None] * K + a[None, :]
  state_seen = (a < K)[None, :] & (e < V)[:, None]
  dtype = o_ptr.dtype.element_ty
  COUNT: tl.constexpr = 1 + DELTA + 2 * RESIDUAL + (DELTA and RESIDUAL)

  S = tl.load(
    initial_ptr + pair * (K * V) + a[None, :] * V + e[:, None], mask=state_seen, other=0.0
  )
  for n in range(chunks):
    start = n * C
    keys = ((row + start) * G + head // (H // G)) * K
    values = ((row + start) * H + head) * V
    chunk = pair * chunks + n
    is_token = (start + i < T)[:, None]
    key_seen = is_token & (a < K)[None, :]
    value_seen = is_token & (e < V)[None, :]
    k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
    q = load_tile(q_ptr + keys + key_offsets, key_seen, EVEN)
    v = tl.trans(load_tile(v_ptr + values + value_offsets, value_seen, EVEN)).to(tl.float32)
    square = matrices_ptr + chunk * (COUNT * C * C) + square_offsets
    gates = gates_ptr + chunk * (ROWS * C)
    decay_all = tl.load(gates + BASE_IN * C + C - 1)

    S_low = S.to(dtype)
    if SAVE:
      if n % SPAN == 0:
        saved = states_ptr + (pair * (chunks // SPAN) + n // SPAN) * ((1 + RESIDUAL) * K * V)
        store_tile(saved + saved_offsets, S_low, state_seen, EVEN)
    decay_in = tl.load(gates + BASE_IN * C + i)[None, :]
    if DELTA or RESIDUAL:
      X = tl.dot(S_low, tl.trans(k), input_precision=PRECISION)
    o = decay_in * tl.dot(S_low, tl.trans(q), input_precision=PRECISION)
    if DELTA:
      y = (v - decay_in * X).to(dtype)
      F = tl.dot(y, tl.trans(tl.load(square + C * C)), input_precision=PRECISION)
      if SAVE:
        store_tile(error_ptr + values + value_offsets, tl.trans(F.to(dtype)), value_seen, EVEN)
    else:
      y = v.to(dtype)
      F = v
    write = (tl.load(gates + BASE_OUT * C + i)[None, :] * F).to(dtype)
    S = tl.dot(write, k, decay_all * S, input_precision=PRECISION)
    o = tl.dot(F.to(dtype), tl.trans(tl.load(square)), o, input_precision=PRECISION)
    store_tile(o_ptr + values + value_offsets, tl.trans(o.to(dtype)), value_seen, EVEN)
    if RESIDUAL:
      prediction = tl.trans(tl.load(square + (2 + DELTA) * C * C))
      r = v - tl.load(gates + BASE_BEFORE * C + i)[None, :] * X
      r -= tl.dot(y, prediction, input_precision=PRECISION)
      if CLIP is not None:
        if SAVE:
          passes = (tl.abs(r) < CLIP).to(tl.int8)
          store_tile(passes_ptr + values + value_offsets, tl.trans(passes), value_seen, EVEN)
        r = tl.minimum(tl.maximum(r, -CLIP), CLIP)
      store_tile(r_ptr + values + value_offsets, tl.trans(r.to(dtype)), value_seen, EVEN)
      if n % BURST == BURST - 1:
        announce(progress_ptr, n + 1)
  if RESIDUAL:
    announce(progress_ptr, chunks)

  # Offsets of their own: those of the first load would stay in registers throughout the loop.
  final = final_ptr + pair * (K * V) + a[:, None] * V + e[None, :]
  tl.store(final, tl.trans(S), mask=(a < K)[:, None] & (e < V)[None, :])


@triton.jit
def _residual(
  q_ptr, k_ptr, matrices_ptr, gates_ptr, initial_ptr, progress_ptr, T, chunks,
  o_ptr, final_ptr, states_ptr, error_ptr, r_ptr, tile, pair,
  H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
  SPAN: tl.constexpr, BURST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
  """R: equations (8), (10), and the residual part of (9), added to what the leader wrote."""
  head = (pair % H).to(tl.int32)
  row = pair // H * T
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tile * BLOCK_V + tl.arange(0, BLOCK_V)
  key_offsets = i[:, None] * (G * K) + a[None, :]
  value_offsets = i[:, None] * (H * V) + e[None, :]
  square_offsets = i[:, None] * C + i[None, :]
  saved_offsets = e[:, None] * K + a[None, :]
  state_seen = (a < K)[None, :] & (e < V)[:, None]
  dtype = o_ptr.dtype.element_ty
  COUNT: tl.constexpr = 3 + 2 * DELTA
  matrices_ptr += (1 + DELTA) * C * C

  R = tl.load(
    initial_ptr + pair * (K * V) + a[None, :] * V + e[:, None], mask=state_seen, other=0.0
  )
  for burst in range(0, chunks, BURST):
    end = tl.minimum(burst + BURST, chunks)
    await_progress(progress_ptr, end)
    for n in range(burst, end):
      start = n * C
      keys = ((row + start) * G + head // (H // G)) * K
      values = ((row + start) * H + head) * V
      chunk = pair * chunks + n
      is_token = (start + i < T)[:, None]
      key_seen = is_token & (a < K)[None, :]
      value_seen = is_token & (e < V)[None, :]
      k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
      q = load_tile(q_ptr + keys + key_offsets, key_seen, EVEN)
      r = tl.trans(load_tile(r_ptr + values + value_offsets, value_seen, EVEN))
      o_base = tl.trans(load_tile(o_ptr + values + value_offsets, value_seen, EVEN))
      square = matrices_ptr + chunk * (COUNT * C * C) + square_offsets
      gates = gates_ptr + chunk * (ROWS * C)
      decay_all = tl.load(gates + BASE_IN * C + C - 1)

      R_low = R.to(dtype)
      if SAVE:
        if n % SPAN == 0:
          saved = states_ptr + ((pair * (chunks // SPAN) + n // SPAN) * 2 + 1) * (K * V)
          store_tile(saved + saved_offsets, R_low, state_seen, EVEN)
      if DELTA:
        Y = tl.dot(R_low, tl.trans(k), input_precision=PRECISION)
        y = r.to(tl.float32) - tl.load(gates + RESIDUAL_IN * C + i)[None, :] * Y
        inverse = tl.trans(tl.load(square + 2 * C * C))
        F = tl.dot(y.to(dtype), inverse, input_precision=PRECISION)
        if SAVE:
          store_tile(error_ptr + values + value_offsets, tl.trans(F.to(dtype)), value_seen, EVEN)
      else:
        F = r.to(tl.float32)
      o = tl.load(gates + RESIDUAL_READ * C + i)[None, :] * tl.dot(
        R_low, tl.trans(q), input_precision=PRECISION
      )
      write = (tl.load(gates + RESIDUAL_OUT * C + i)[None, :] * F).to(dtype)
      R = tl.dot(write, k, decay_all * R, input_precision=PRECISION)
      o = tl.dot(F.to(dtype), tl.trans(tl.load(square)), o, input_precision=PRECISION)
      o += o_base.to(tl.float32)
      store_tile(o_ptr + values + value_offsets, tl.trans(o.to(dtype)), value_seen, EVEN)

  final = final_ptr + pair * (K * V) + a[:, None] * V + e[None, :]
  tl.store(final, tl.trans(R), mask=(a < K)[:, None] & (e < V)[None, :])


@triton.jit
def forward_kernel(
  q_ptr,
  k_ptr,
  v_ptr,
  matrices_ptr,
  gates_ptr,
  base_ptr,
  residual_ptr,
  idle_ptr,
  T,
  chunks,
  programs,
  o_ptr,
  base_out_ptr,
  residual_out_ptr,
  states_ptr,
  base_error_ptr,
  residual_error_ptr,
  r_ptr,
  passes_ptr,
  progress_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  BURST: tl.constexpr,
  GROUP: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr,
  RESIDUAL: tl.constexpr,
  CLIP: tl.constexpr,
  SAVE: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """Grid: `programs` leaders, B * H times the value tiles, and as many followers if RESIDUAL.

  SAVE keeps what the backward pass reads, the states before every SPAN-th chunk among it.
  progress_ptr starts as zeros, one counter a leader, in the buffer of idle_ptr.
  """
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  if RESIDUAL:
    follows, index = role(programs, GROUP)
    tile, pair = index % TILES, (index // TILES).to(tl.int64)
    if follows == 0:
      _base(
        q_ptr, k_ptr, v_ptr, matrices_ptr, gates_ptr, base_ptr, progress_ptr + index, T, chunks,
        o_ptr, base_out_ptr, states_ptr, base_error_ptr, r_ptr, passes_ptr, tile, pair,
        H, G, K, V, C, SPAN, BURST, BLOCK_K, BLOCK_V, DELTA, RESIDUAL, CLIP, SAVE, EVEN, PRECISION,
      )  # fmt: skip
    else:
      _residual(
        q_ptr, k_ptr, matrices_ptr, gates_ptr, residual_ptr, progress_ptr + index, T, chunks,
        o_ptr, residual_out_ptr, states_ptr, residual_error_ptr, r_ptr, tile, pair,
        H, G, K, V, C, SPAN, BURST, BLOCK_K, BLOCK_V, DELTA, SAVE, EVEN, PRECISION,
      )  # fmt: skip
  else:
    index = tl.program_id(0)
    tile, pair = index % TILES, (index // TILES).to(tl.int64)
    _base(
      q_ptr, k_ptr, v_ptr, matrices_ptr, gates_ptr, base_ptr, progress_ptr, T, chunks,
      o_ptr, base_out_ptr, states_ptr, base_error_ptr, r_ptr, passes_ptr, tile, pair,
      H, G, K, V, C, SPAN, BURST, BLOCK_K, BLOCK_V, DELTA, RESIDUAL, CLIP, SAVE, EVEN, PRECISION,
    )  # fmt: skip
