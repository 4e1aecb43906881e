"""Kernel B: walks the chunks of one head and value tile with both states in registers.

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
  fresh,
  load_tile,
  load_transposed,
  part_chunks,
  store_bits,
  store_state,
  store_tile,
  store_transposed,
)

ROWS = tl.constexpr(GATES)


@triton.jit
def written(write, k, state, DELTA: tl.constexpr, dtype: tl.constexpr, PRECISION: tl.constexpr):
  """state + write k. With the delta rule writes of like keys cancel: they get twice the digits."""
  low = write.to(dtype)
  state = tl.dot(low, k, state, input_precision=PRECISION)
  if DELTA and dtype != tl.float32:
    rest = (write - low.to(tl.float32)).to(dtype)
    state = tl.dot(rest, k, state, input_precision=PRECISION)
  return state


@triton.jit
def errors(exact, pointers, PRECISION: tl.constexpr):
  """y, rounded to the dtype of the matrices, and y inverse^T.

  What is rounded of y is not amplified where keys are alike, as what is rounded of the inverse
  would be (`prepare`): a state is off by 0.2 % by it.
  """
  y = exact.to(pointers.dtype.element_ty)
  return y, tl.dot(y, tl.trans(tl.load(pointers)), input_precision=PRECISION)


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
  chunks,
  o_ptr,
  base_out_ptr,
  residual_out_ptr,
  states_ptr,
  residual_states_ptr,
  base_error_ptr,
  residual_error_ptr,
  passes_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  SPLIT: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  MATRICES: tl.constexpr,
  DELTA: tl.constexpr,
  RESIDUAL: tl.constexpr,
  CLIP: tl.constexpr,
  OUTPUT: tl.constexpr,
  SAVE: tl.constexpr,
  BITS_LAST: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
  STAGES: tl.constexpr,
):
  """Grid (B * H * SPLIT * value tiles,). Letters as in the chunk form: F = U / b, or W / g.

  Each of the SPLIT parts of a sequence has states of its own to start from and to end with. SAVE
  keeps what the backward pass reads, the states before every SPAN-th chunk among it, and stores the
  clip's bits at the end of a chunk if BITS_LAST. Without OUTPUT only final states are wanted, of
  all parts but the last.
  """
  # The compiler keeps to an order of products and stores; these are the fastest that were found.
  WIDE: tl.constexpr = DELTA and RESIDUAL and BLOCK_V >= 64
  READ_LATE: tl.constexpr = DELTA and RESIDUAL and not WIDE
  WRITE_FIRST: tl.constexpr = SAVE and DELTA and not READ_LATE
  READ_LAST: tl.constexpr = not DELTA and BLOCK_V >= 64
  # Of two saved states by the report of Triton 3.9, which has no spills so. On an H200, with
  # Triton 3.6, it costs 4 % of the walk (docs/gpu.md).
  STORE_EARLY: tl.constexpr = READ_LATE or (WIDE and SAVE)
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  WORDS: tl.constexpr = (C + 31) // 32
  sequence = tl.program_id(0) // TILES
  first = 0
  last = chunks
  if SPLIT > 1:
    first, last = part_chunks(sequence, chunks, SPAN, SPLIT)
    if not OUTPUT:
      last = tl.where(sequence % SPLIT == SPLIT - 1, first, last)
  pair = (sequence // SPLIT).to(tl.int64)
  sequence = sequence.to(tl.int64)
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  first_value = (tl.program_id(0) % TILES) * BLOCK_V
  e = tl.arange(0, BLOCK_V)
  saved_offsets = e[:, None] * K + a[None, :]
  is_value = first_value + e < V
  identity = (i[:, None] == i[None, :]).to(v_ptr.dtype.element_ty)
  state_seen = (a < K)[None, :] & is_value[:, None]

  dtype = o_ptr.dtype.element_ty
  square_dtype = matrices_ptr.dtype.element_ty
  state = sequence * (K * V) + first_value
  span = pair * (chunks // SPAN) + first // SPAN
  saved = span * (K * V) + first_value * K + saved_offsets

  S = load_transposed(base_ptr + state, V - first_value, K, V, BLOCK_K, BLOCK_V, EVEN)
  if SAVE:
    store_tile(states_ptr + saved, S.to(dtype), state_seen, EVEN)
  if RESIDUAL:
    R = load_transposed(residual_ptr + state, V - first_value, K, V, BLOCK_K, BLOCK_V, EVEN)
    if SAVE:
      store_tile(residual_states_ptr + saved, R.to(dtype), state_seen, EVEN)

  if SPLIT == 1 or OUTPUT:
    tl.assume(last > first)
  # Told its stages, the loop prefetches all loads, not only those of products. For the addresses of
  # those the residual delta rule has no registers left while it saves.
  for n in tl.range(first, last, num_stages=None if DELTA and RESIDUAL and SAVE else STAGES):
    start = n * C
    t = fresh(i, n) if RESIDUAL else i  # one state leaves registers enough
    key_offsets = t[:, None] * (G * K) + a[None, :]
    value_offsets = t[:, None] * (H * V) + e[None, :]
    square_offsets = t[:, None] * C + i[None, :]
    # Of two states at full width, what is held throughout the loop takes registers from products.
    program = fresh(tl.program_id(0), start) if WIDE else tl.program_id(0)
    here = program // (TILES * SPLIT)
    token = here // H * T + start
    keys = (token * G + here % H // (H // G)).to(tl.int64) * K
    values = (token * H + here % H).to(tl.int64) * V + program % TILES * BLOCK_V
    chunk = (here * chunks + n).to(tl.int64)
    is_token = (start + i < T)[:, None]
    key_seen = is_token & (a < K)[None, :]
    value_seen = is_token & is_value[None, :]
    k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
    q = load_tile(q_ptr + keys + key_offsets, key_seen, EVEN)
    if DELTA:
      # The pipeline prefetches what products take: so v comes through one with the identity.
      token_seen = (start + i < T)[None, :] & is_value[:, None]
      transposed = t[None, :] * (H * V) + e[:, None]
      v = load_tile(v_ptr + values + transposed, token_seen, EVEN)
      if not WIDE:
        v = tl.dot(v, identity, input_precision=PRECISION)
    else:
      v = tl.trans(load_tile(v_ptr + values + value_offsets, value_seen, EVEN)).to(tl.float32)
    square = matrices_ptr + chunk * (MATRICES * C * C) + square_offsets
    gates = gates_ptr + chunk * (ROWS * C)
    S_low = S.to(dtype)
    decay_in = tl.load(gates + BASE_IN * C + i)[None, :]
    if DELTA:
      if not READ_LATE:
        o = decay_in * tl.dot(S_low, tl.trans(q), input_precision=PRECISION)
      X = tl.dot(S_low, tl.trans(k), input_precision=PRECISION)
      if WIDE:  # not before, or registers spill
        v = tl.dot(v, identity, input_precision=PRECISION)
      exact = v - decay_in * X
      y, F = errors(exact, square + C * C, PRECISION)
      if RESIDUAL:  # from what is in registers, where v is not
        r = exact + (decay_in - tl.load(gates + BASE_BEFORE * C + i)[None, :]) * X
      if SAVE and WIDE:
        store_tile(base_error_ptr + values + value_offsets, tl.trans(F.to(dtype)), value_seen, EVEN)
      if READ_LATE:
        o = decay_in * tl.dot(S_low, tl.trans(q), input_precision=PRECISION)
    else:
      # In this order, or registers spill.
      if RESIDUAL:
        X = tl.dot(S_low, tl.trans(k), input_precision=PRECISION)
      o = decay_in * tl.dot(S_low, tl.trans(q), input_precision=PRECISION)
      y = v.to(square_dtype)
      F = v
    if RESIDUAL:
      residual_square = square + (1 + DELTA) * C * C
      if not DELTA:
        r = v - tl.load(gates + BASE_BEFORE * C + i)[None, :] * X
      prediction = tl.trans(tl.load(residual_square + C * C))
      r -= tl.dot(y, prediction, input_precision=PRECISION)
      if CLIP is not None:
        if SAVE:
          passes = tl.where(tl.abs(r) < CLIP, 1.0, 0.0).to(dtype)
        r = tl.minimum(tl.maximum(r, -CLIP), CLIP)
    if not WRITE_FIRST:
      o = tl.dot(y, tl.trans(tl.load(square)), o, input_precision=PRECISION)
    write = tl.load(gates + BASE_OUT * C + i)[None, :] * F
    decay_all = tl.load(gates + BASE_IN * C + C - 1)
    S = written(write, k, decay_all * S, DELTA, dtype, PRECISION)
    if SAVE and DELTA and not WIDE:
      store_tile(base_error_ptr + values + value_offsets, tl.trans(F.to(dtype)), value_seen, EVEN)
    if WRITE_FIRST:
      o = tl.dot(y, tl.trans(tl.load(square)), o, input_precision=PRECISION)
    if SAVE and RESIDUAL and CLIP is not None and not BITS_LAST:
      store_bits(passes_ptr + chunk * (WORDS * V) + first_value, e, is_value, passes, V, C)
    if RESIDUAL:
      R_low = R.to(dtype)
      read = tl.load(gates + RESIDUAL_READ * C + i)[None, :]
      o += read * tl.dot(R_low, tl.trans(q), input_precision=PRECISION)
      if DELTA:
        Y = tl.dot(R_low, tl.trans(k), input_precision=PRECISION)
        exact = r - tl.load(gates + RESIDUAL_IN * C + i)[None, :] * Y
        y, F = errors(exact, residual_square + 2 * C * C, PRECISION)
      else:
        y = r.to(square_dtype)
        F = r
      if not READ_LAST:
        o = tl.dot(y, tl.trans(tl.load(residual_square)), o, input_precision=PRECISION)
        if OUTPUT and STORE_EARLY:
          store_tile(o_ptr + values + value_offsets, tl.trans(o.to(dtype)), value_seen, EVEN)
      write = tl.load(gates + RESIDUAL_OUT * C + i)[None, :] * F
      decay_all = tl.load(gates + BASE_IN * C + C - 1)  # again, or it is kept in a register
      R = written(write, k, decay_all * R, DELTA, dtype, PRECISION)
      if SAVE:
        store_tile(
          residual_error_ptr + values + value_offsets, tl.trans(F.to(dtype)), value_seen, EVEN
        )
      if READ_LAST:
        o = tl.dot(y, tl.trans(tl.load(residual_square)), o, input_precision=PRECISION)
    if OUTPUT and not STORE_EARLY:
      u = fresh(i, start) if WIDE else t
      value_offsets = u[:, None] * (H * V) + e[None, :]
      store_tile(o_ptr + values + value_offsets, tl.trans(o.to(dtype)), value_seen, EVEN)
    # At the end, where little else is in registers.
    if SAVE and RESIDUAL and CLIP is not None and BITS_LAST:
      words = passes_ptr + chunk * (WORDS * V) + program % TILES * BLOCK_V
      store_bits(words, fresh(e, start) if WIDE else e, is_value, passes, V, C)
    if SAVE:
      if (n + 1) % SPAN == 0 and n + 1 < last:
        span = (fresh(pair, n) if WIDE else pair) * (chunks // SPAN) + (n + 1) // SPAN
        place = span * (K * V) + first_value * K
        store_state(states_ptr + place, S.to(dtype), V - first_value, n, K, EVEN)
        if RESIDUAL:
          store_state(residual_states_ptr + place, R.to(dtype), V - first_value, n, K, EVEN)

  store_transposed(base_out_ptr + state, S, V - first_value, chunks, K, V, EVEN)
  if RESIDUAL:
    store_transposed(residual_out_ptr + state, R, V - first_value, chunks, K, V, EVEN)
