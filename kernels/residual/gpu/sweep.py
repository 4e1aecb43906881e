"""Backward, sequential part: walks the chunks from the end with one state's gradient in registers.

Called for the residual state, whose gradient the outputs alone decide, and then for the base state,
which is read by the residuals too. Only what the next chunk waits for is computed here: the adjoint
from dW to dR0, and from dU to dS0. What it learns (dR1, dz and the prediction's gradient dp, dS1
and dy) is stored for `keys`, which is parallel over chunks. Transposed like `forward`, whose
matrices it reads: they give dy and dz times the gate.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  BASE_BEFORE,
  BASE_IN,
  BASE_OUT,
  BASE_UNDO,
  GATES,
  RESIDUAL_IN,
  RESIDUAL_OUT,
  RESIDUAL_READ,
  RESIDUAL_UNDO,
  load_bits,
  load_tile,
  load_transposed,
  part_chunks,
  store_state,
  store_tile,
  store_transposed,
)

ROWS = tl.constexpr(GATES)


@triton.jit
def sweep_kernel(
  q_ptr,
  k_ptr,
  do_ptr,
  matrices_ptr,
  gates_ptr,
  dprediction_ptr,
  passes_ptr,
  dstate_in_ptr,
  T,
  first_chunk,
  chunks,
  dstates_ptr,
  dy_ptr,
  dprediction_out_ptr,
  dstate_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  SPLIT: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  IS_RESIDUAL: tl.constexpr,
  STORE: tl.constexpr,
  DELTA: tl.constexpr,
  RESIDUAL: tl.constexpr,
  CLIP: tl.constexpr,
  STAGES: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """Grid (B * H * SPLIT * value tiles,); chunks first_chunk .. first_chunk + chunks - 1, backwards.

  Each of the SPLIT parts has a state's gradient of its own to start from and to end with. STORE
  keeps the state gradients after every SPAN-th chunk, and those of what was written; without it
  only the last gradient is wanted, of all parts but the first. The residual state's sweep stores
  the gradient of the prediction, -gamma dz where the residual passes the clip; the base state's
  reads it, if there are two.
  """
  PREDICTS: tl.constexpr = RESIDUAL and not IS_RESIDUAL
  # Which of the chunk's matrices is which, as `prepare` orders them, and rows of the gates.
  MATRICES: tl.constexpr = 1 + DELTA + 2 * RESIDUAL + (DELTA and RESIDUAL)
  SCORES: tl.constexpr = 1 + DELTA if IS_RESIDUAL else 0
  INVERSE: tl.constexpr = 4 if IS_RESIDUAL else 1
  PREDICTION: tl.constexpr = 2 + DELTA
  QUERY_READ: tl.constexpr = RESIDUAL_READ if IS_RESIDUAL else BASE_IN
  KEY_READ: tl.constexpr = RESIDUAL_IN if IS_RESIDUAL else BASE_IN
  OUT: tl.constexpr = RESIDUAL_OUT if IS_RESIDUAL else BASE_OUT
  UNDO: tl.constexpr = RESIDUAL_UNDO if IS_RESIDUAL else BASE_UNDO
  WORDS: tl.constexpr = (C + 31) // 32
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  sequence = tl.program_id(0) // TILES
  first_value = tl.program_id(0) % TILES * BLOCK_V
  first = 0
  last = chunks
  if SPLIT > 1:
    first, last = part_chunks(sequence, chunks, SPAN, SPLIT)
    if not STORE:
      first = tl.where(sequence % SPLIT == 0, last, first)
  pair = (sequence // SPLIT).to(tl.int64)
  state = sequence.to(tl.int64) * (K * V) + first_value
  dS = load_transposed(dstate_in_ptr + state, V - first_value, K, V, BLOCK_K, BLOCK_V, EVEN)
  dtype = do_ptr.dtype.element_ty
  square_dtype = matrices_ptr.dtype.element_ty
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  head = pair % H
  row = pair // H * T
  all_chunks = tl.cdiv(T, C * SPAN) * SPAN  # of the sequence, of which these are a piece
  is_value = first_value + e < V
  key_offsets = i[:, None] * (G * K) + a[None, :]
  value_offsets = i[:, None] * (H * V) + e[None, :]
  square_offsets = i[:, None] * C + i[None, :]

  # Told its stages, the loop prefetches all loads, not only those of products.
  for step in tl.range(last - first, num_stages=STAGES):
    n = last - 1 - step
    start = (first_chunk + n) * C
    values = ((row + start) * H + head) * V + first_value
    piece_values = (((pair // H * chunks + n) * C) * H + head) * V + first_value
    keys = ((row + start) * G + head // (H // G)) * K
    chunk = pair * all_chunks + first_chunk + n
    is_token = (start + i < T)[:, None]
    key_seen = is_token & (a < K)[None, :]
    value_seen = is_token & is_value[None, :]
    q = load_tile(q_ptr + keys + key_offsets, key_seen, EVEN)
    do = tl.trans(load_tile(do_ptr + values + value_offsets, value_seen, EVEN))
    k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
    square = matrices_ptr + chunk * (MATRICES * C * C) + square_offsets
    gates = gates_ptr + chunk * (ROWS * C)
    dS_low = dS.to(dtype)
    if STORE:
      if n % SPAN == SPAN - 1:
        saved = dstates_ptr + (pair * (chunks // SPAN) + n // SPAN) * (K * V) + first_value * K
        store_state(saved, dS_low, V - first_value, n, K, EVEN)
    if IS_RESIDUAL and STORE and CLIP is not None:
      words = passes_ptr + chunk * (WORDS * V) + first_value
      passes = load_bits(words, e, is_value, V, C)
    if PREDICTS:
      dp = tl.trans(load_tile(dprediction_ptr + piece_values + value_offsets, value_seen, EVEN))
    gated_dy = tl.dot(dS_low, tl.trans(k), input_precision=PRECISION)
    gated_dy *= tl.load(gates + OUT * C + i)[None, :]
    if DELTA:
      inverse = tl.load(square + INVERSE * C * C)
      gated_dy = tl.dot(gated_dy.to(square_dtype), inverse, input_precision=PRECISION)
    scores = tl.load(square + SCORES * C * C)
    gated_dy = tl.dot(do.to(square_dtype), scores, gated_dy, input_precision=PRECISION)
    if PREDICTS:
      prediction = tl.load(square + PREDICTION * C * C)
      gated_dy = tl.dot(dp.to(square_dtype), prediction, gated_dy, input_precision=PRECISION)
    if STORE:
      dy = tl.load(gates + UNDO * C + i)[None, :] * gated_dy
      store_tile(dy_ptr + piece_values + value_offsets, tl.trans(dy.to(dtype)), value_seen, EVEN)
    read = tl.load(gates + QUERY_READ * C + i)[None, :] * do.to(tl.float32)
    dS *= tl.load(gates + BASE_IN * C + C - 1)
    dS = tl.dot(read.to(dtype), q, dS, input_precision=PRECISION)
    if DELTA:
      dX = -tl.load(gates + KEY_READ * C + i)[None, :] * gated_dy
      if PREDICTS:
        dX += tl.load(gates + BASE_BEFORE * C + i)[None, :] * dp.to(tl.float32)
      dS = tl.dot(dX.to(dtype), k, dS, input_precision=PRECISION)
    elif PREDICTS:
      dX = tl.load(gates + BASE_BEFORE * C + i)[None, :] * dp.to(tl.float32)
      dS = tl.dot(dX.to(dtype), k, dS, input_precision=PRECISION)
    # Behind what the next chunk waits for.
    if IS_RESIDUAL and STORE:
      dp = -gated_dy
      if CLIP is not None:
        dp = tl.where(passes != 0, dp, 0.0)
      dp = tl.trans(dp.to(dtype))
      store_tile(dprediction_out_ptr + piece_values + value_offsets, dp, value_seen, EVEN)

  store_transposed(dstate_ptr + state, dS, V - first_value, chunks, K, V, EVEN)
