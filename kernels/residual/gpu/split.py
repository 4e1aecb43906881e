"""Few heads and long sequences: parts of a sequence side by side, from states that are found first.

The kernels that walk the chunks have a program for every head and value tile, too few to fill a
card where heads are few. So a sequence is cut into parts. A part takes the base state that comes
into it to M S + F, and the residual state likewise for given residuals, which need the base state.
F is what the walking kernel itself leaves of a part that starts from nothing. Here are M, a matrix
for the delta rule (otherwise it is the decay of the part), and the composition of the parts.
The same holds backwards for the gradients, of the residual state and then of the base state.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.tiles import (
  BASE_IN,
  BASE_OUT,
  GATES,
  RESIDUAL_IN,
  RESIDUAL_OUT,
  load_tile,
  part_chunks,
)

ROWS = tl.constexpr(GATES)


@triton.jit
def transitions_kernel(
  k_ptr,
  matrices_ptr,
  gates_ptr,
  T,
  first_chunk,
  chunks,
  transitions_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  SPLIT: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  MATRICES: tl.constexpr,
  STATES: tl.constexpr,
  ADJOINT: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """M^T of every part but the first and the last, which need none: the delta rule on the identity.

  Grid (B * H * SPLIT * STATES * tiles of K rows,); writes [B, H, SPLIT, STATES, K, K]. A state is
  a row [V, K] times M^T, as in `forward`. ADJOINT walks backwards: a gradient times M.
  """
  TILES: tl.constexpr = (K + BLOCK_V - 1) // BLOCK_V
  is_residual = tl.program_id(0) // TILES % STATES
  sequence = tl.program_id(0) // (TILES * STATES)
  part = sequence % SPLIT
  first, last = part_chunks(sequence, chunks, SPAN, SPLIT)
  last = tl.where((part == 0) | (part == SPLIT - 1), first, last)
  pair = (sequence // SPLIT).to(tl.int64)
  head = pair % H
  row = pair // H * T
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = (tl.program_id(0) % TILES) * BLOCK_V + tl.arange(0, BLOCK_V)
  key_offsets = i[:, None] * (G * K) + a[None, :]
  square_offsets = i[:, None] * C + i[None, :]
  # Gates on either side of the inverse, of which the adjoint is the transpose.
  read = tl.where(is_residual == 1, RESIDUAL_IN, BASE_IN)
  write = tl.where(is_residual == 1, RESIDUAL_OUT, BASE_OUT)
  if ADJOINT:
    before, behind = write, read
  else:
    before, behind = read, write
  square_offsets += (1 + 3 * is_residual) * (C * C)
  dtype = k_ptr.dtype.element_ty
  square_dtype = matrices_ptr.dtype.element_ty
  all_chunks = tl.cdiv(T, C * SPAN) * SPAN  # of the sequence, of which these are a piece
  S = (e[:, None] == a[None, :]).to(tl.float32)

  for step in range(last - first):
    n = last - 1 - step if ADJOINT else first + step
    start = (first_chunk + n) * C
    keys = ((row + start) * G + head // (H // G)) * K
    key_seen = (start + i < T)[:, None] & (a < K)[None, :]
    k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
    chunk = pair * all_chunks + first_chunk + n
    inverse = tl.load(matrices_ptr + chunk * (MATRICES * C * C) + square_offsets)
    gates = gates_ptr + chunk * (ROWS * C)
    decay_all = tl.load(gates + BASE_IN * C + C - 1)
    X = tl.dot(S.to(dtype), tl.trans(k), input_precision=PRECISION)
    X = (tl.load(gates + before * C + i)[None, :] * X).to(square_dtype)
    F = tl.dot(X, inverse if ADJOINT else tl.trans(inverse), input_precision=PRECISION)
    change = (-tl.load(gates + behind * C + i)[None, :] * F).to(dtype)
    S = tl.dot(change, k, decay_all * S, input_precision=PRECISION)

  out = transitions_ptr + (tl.program_id(0) // TILES).to(tl.int64) * (K * K)
  seen = (e < K)[:, None] & (a < K)[None, :]
  tl.store(out + e[:, None] * K + a[None, :], S, mask=seen)


@triton.jit
def combine_kernel(
  edge_ptr,
  ends_ptr,
  transitions_ptr,
  states_ptr,
  K: tl.constexpr,
  V: tl.constexpr,
  SPLIT: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  STATES: tl.constexpr,
  STATE: tl.constexpr,
  DELTA: tl.constexpr,
  ADJOINT: tl.constexpr,
):
  """The state [K, V] that comes into every part; grid (B * H * value tiles,).

  `edge` holds the state that comes into the first part, `ends` what leaves every part: the first
  from that state, the others from nothing. ADJOINT counts parts from the last. STATE says which of
  the STATES maps of a part is meant; without a delta rule they are one number.
  """
  STEP: tl.constexpr = BLOCK_K if BLOCK_K <= 128 else 64  # rows of a map that fit shared memory
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  pair = (tl.program_id(0) // TILES).to(tl.int64)
  a = tl.arange(0, BLOCK_K)
  e = (tl.program_id(0) % TILES) * BLOCK_V + tl.arange(0, BLOCK_V)
  steps = tl.arange(0, STEP)
  offsets = a[None, :] * V + e[:, None]
  seen = (a < K)[None, :] & (e < V)[:, None]
  edge = pair * SPLIT + (SPLIT - 1 if ADJOINT else 0)
  S = tl.load(edge_ptr + edge * (K * V) + offsets, mask=seen, other=0.0)
  tl.store(states_ptr + edge * (K * V) + offsets, S, mask=seen)
  S = tl.load(ends_ptr + edge * (K * V) + offsets, mask=seen, other=0.0)
  for j in range(1, SPLIT - 1):
    part = pair * SPLIT + (SPLIT - 1 - j if ADJOINT else j)
    state = states_ptr + part * (K * V)
    tl.store(state + offsets, S, mask=seen)
    passed = tl.load(ends_ptr + part * (K * V) + offsets, mask=seen, other=0.0)
    if DELTA:
      map_ptr = transitions_ptr + (part * STATES + STATE) * (K * K)
      if STEP < BLOCK_K:
        tl.debug_barrier()  # the product reads back what was stored: the map does not fit whole
      for first in range(0, K, STEP):
        rows = first + steps
        map_seen = (rows < K)[:, None] & (a < K)[None, :]
        M = tl.load(map_ptr + rows[:, None] * K + a[None, :], mask=map_seen, other=0.0)
        if STEP < BLOCK_K:
          state_seen = (rows < K)[None, :] & (e < V)[:, None]
          x = tl.load(state + rows[None, :] * V + e[:, None], mask=state_seen, other=0.0)
        else:
          x = S
        passed = tl.dot(x, M, passed, input_precision='tf32x3')
    else:
      passed += tl.load(transitions_ptr + part) * S
    S = passed
  edge = pair * SPLIT + (0 if ADJOINT else SPLIT - 1)
  tl.store(states_ptr + edge * (K * V) + offsets, S, mask=seen)
