"""Backward, sequential part: walks the chunks from the end with a state gradient in registers.

Only what the next chunk waits for is computed here: the adjoint from dW to dS0 and dR0. What it
learns (dS1, dR1, dy, dz, dD) is stored for `gradients`, which is parallel over chunks. Built like
`forward`, with the roles exchanged: the residual state's gradient leads.
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
  announce,
  await_progress,
  load_tile,
  role,
  store_tile,
)

ROWS = tl.constexpr(GATES)


@triton.jit
def _residual(
  q_ptr, k_ptr, do_ptr, matrices_ptr, gates_ptr, passes_ptr, initial_ptr, progress_ptr, T,
  first_chunk, chunks, dstates_ptr, dz_ptr, dinnovation_ptr, final_ptr, tile, pair,
  H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
  SPAN: tl.constexpr, BURST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr, CLIP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
  dtype = do_ptr.dtype.element_ty
  COUNT: tl.constexpr = 3 + 2 * DELTA
  matrices_ptr += (1 + DELTA) * C * C

  dR = tl.load(
    initial_ptr + pair * (K * V) + a[None, :] * V + e[:, None], mask=state_seen, other=0.0
  )
  for step in range(chunks):
    n = chunks - 1 - step
    start = (first_chunk + n) * C
    keys = ((row + start) * G + head // (H // G)) * K
    values = ((row + start) * H + head) * V
    piece_values = ((pair // H * chunks + n) * (C * H) + head) * V
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

    dR_low = dR.to(dtype)
    if n % SPAN == SPAN - 1:
      saved = dstates_ptr + ((pair * (chunks // SPAN) + n // SPAN) * 2 + 1) * (K * V)
      store_tile(saved + saved_offsets, dR_low, state_seen, EVEN)
    dz = tl.dot(dR_low, tl.trans(k), input_precision=PRECISION)
    dz *= tl.load(gates + RESIDUAL_OUT * C + i)[None, :]
    dz = tl.dot(do, tl.load(square), dz, input_precision=PRECISION)
    if DELTA:
      dz = tl.dot(dz.to(dtype), tl.load(square + 2 * C * C), input_precision=PRECISION)
    read = tl.load(gates + RESIDUAL_READ * C + i)[None, :]
    dR = tl.dot(
      (read * do.to(tl.float32)).to(dtype), q, decay_all * dR, input_precision=PRECISION
    )
    if DELTA:
      dR = tl.dot((-read * dz).to(dtype), k, dR, input_precision=PRECISION)
    store_tile(dz_ptr + piece_values + value_offsets, tl.trans(dz.to(dtype)), value_seen, EVEN)
    dD = tl.load(gates + GAMMA * C + i)[None, :] * dz
    if CLIP is not None:
      passes = tl.trans(load_tile(passes_ptr + values + value_offsets, value_seen, EVEN))
      dD = tl.where(passes != 0, dD, 0.0)
    store_tile(
      dinnovation_ptr + piece_values + value_offsets, tl.trans(dD.to(dtype)), value_seen, EVEN
    )
    if step % BURST == BURST - 1:
      announce(progress_ptr, step + 1)
  announce(progress_ptr, chunks)

  # Offsets of their own: those of the first load would stay in registers throughout the loop.
  final = final_ptr + pair * (K * V) + a[:, None] * V + e[None, :]
  tl.store(final, tl.trans(dR), mask=(a < K)[:, None] & (e < V)[None, :])


@triton.jit
def _base(
  q_ptr, k_ptr, do_ptr, matrices_ptr, gates_ptr, initial_ptr, progress_ptr, T,
  first_chunk, chunks, dstates_ptr, dy_ptr, dinnovation_ptr, final_ptr, tile, pair,
  H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
  SPAN: tl.constexpr, BURST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr, RESIDUAL: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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
  dtype = do_ptr.dtype.element_ty
  COUNT: tl.constexpr = 1 + DELTA + 2 * RESIDUAL + (DELTA and RESIDUAL)

  dS = tl.load(
    initial_ptr + pair * (K * V) + a[None, :] * V + e[:, None], mask=state_seen, other=0.0
  )
  for burst in range(0, chunks, BURST):
    end = tl.minimum(burst + BURST, chunks)
    if RESIDUAL:
      await_progress(progress_ptr, end)
    for step in range(burst, end):
      n = chunks - 1 - step
      start = (first_chunk + n) * C
      keys = ((row + start) * G + head // (H // G)) * K
      values = ((row + start) * H + head) * V
      piece_values = ((pair // H * chunks + n) * (C * H) + head) * V
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

      dS_low = dS.to(dtype)
      if n % SPAN == SPAN - 1:
        saved = dstates_ptr + (pair * (chunks // SPAN) + n // SPAN) * ((1 + RESIDUAL) * K * V)
        store_tile(saved + saved_offsets, dS_low, state_seen, EVEN)
      dy = tl.dot(dS_low, tl.trans(k), input_precision=PRECISION)
      dy *= tl.load(gates + BASE_OUT * C + i)[None, :]
      dy = tl.dot(do, tl.load(square), dy, input_precision=PRECISION)
      if DELTA:
        dy = tl.dot(dy.to(dtype), tl.load(square + C * C), input_precision=PRECISION)
      if RESIDUAL:
        dD = -tl.trans(load_tile(dinnovation_ptr + piece_values + value_offsets, value_seen, EVEN))
        prediction = tl.load(square + (2 + DELTA) * C * C)
        dy = tl.dot(dD, prediction, dy, input_precision=PRECISION)
      read = (tl.load(gates + BASE_IN * C + i)[None, :] * do.to(tl.float32)).to(dtype)
      dS = tl.dot(read, q, decay_all * dS, input_precision=PRECISION)
      if DELTA:
        dX = -tl.load(gates + BASE_READ * C + i)[None, :] * dy
        if RESIDUAL:
          dX += tl.load(gates + BASE_BEFORE * C + i)[None, :] * dD.to(tl.float32)
        dS = tl.dot(dX.to(dtype), k, dS, input_precision=PRECISION)
      elif RESIDUAL:
        dX = tl.load(gates + BASE_BEFORE * C + i)[None, :] * dD.to(tl.float32)
        dS = tl.dot(dX.to(dtype), k, dS, input_precision=PRECISION)
      store_tile(dy_ptr + piece_values + value_offsets, tl.trans(dy.to(dtype)), value_seen, EVEN)

  final = final_ptr + pair * (K * V) + a[:, None] * V + e[None, :]
  tl.store(final, tl.trans(dS), mask=(a < K)[:, None] & (e < V)[None, :])


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
  idle_ptr,
  T,
  first_chunk,
  chunks,
  programs,
  dstates_ptr,
  dy_ptr,
  dz_ptr,
  dinnovation_ptr,
  dbase_ptr,
  dresidual_ptr,
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
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """Grid as `forward`'s; chunks first_chunk .. first_chunk + chunks - 1, backwards.

  The state gradients after every SPAN-th chunk are kept.
  """
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  if RESIDUAL:
    follows, index = role(programs, GROUP)
    tile, pair = index % TILES, (index // TILES).to(tl.int64)
    if follows == 0:
      _residual(
        q_ptr, k_ptr, do_ptr, matrices_ptr, gates_ptr, passes_ptr, dresidual_in_ptr,
        progress_ptr + index, T, first_chunk, chunks, dstates_ptr, dz_ptr, dinnovation_ptr,
        dresidual_ptr, tile, pair,
        H, G, K, V, C, SPAN, BURST, BLOCK_K, BLOCK_V, DELTA, CLIP, EVEN, PRECISION,
      )  # fmt: skip
    else:
      _base(
        q_ptr, k_ptr, do_ptr, matrices_ptr, gates_ptr, dbase_in_ptr, progress_ptr + index, T,
        first_chunk, chunks, dstates_ptr, dy_ptr, dinnovation_ptr, dbase_ptr, tile, pair,
        H, G, K, V, C, SPAN, BURST, BLOCK_K, BLOCK_V, DELTA, RESIDUAL, EVEN, PRECISION,
      )  # fmt: skip
  else:
    index = tl.program_id(0)
    tile, pair = index % TILES, (index // TILES).to(tl.int64)
    _base(
      q_ptr, k_ptr, do_ptr, matrices_ptr, gates_ptr, dbase_in_ptr, progress_ptr, T,
      first_chunk, chunks, dstates_ptr, dy_ptr, dinnovation_ptr, dbase_ptr, tile, pair,
      H, G, K, V, C, SPAN, 1 << 30, BLOCK_K, BLOCK_V, DELTA, RESIDUAL, EVEN, PRECISION,
    )  # fmt: skip
