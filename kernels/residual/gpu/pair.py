"""Kernel B where heads are too few for it: a program a state, the residual's behind the base's.

With one program a multiprocessor, a walk with both states waits for itself. The base state asks
nothing of the residual one: so programs of their own walk it, and hand the residuals and their part
of the output over through memory, a block of chunks at a time. The programs of the residual state
follow. Transposed as in `forward`, whose letters these are.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.forward import errors, written
from rla_jax.kernels.residual.gpu.handover import post, take_turn, wait
from rla_jax.kernels.residual.gpu.tiles import (
  BASE_BEFORE,
  BASE_IN,
  BASE_OUT,
  GATES,
  RESIDUAL_IN,
  RESIDUAL_OUT,
  RESIDUAL_READ,
  load_tile,
  load_transposed,
  store_bits,
  store_state,
  store_tile,
  store_transposed,
)

ROWS = tl.constexpr(GATES)


@triton.jit
def load_handed(pointers, seen, EVEN: tl.constexpr, identity):
  """A tile that `store_state` stored, in float32; 16 bits wide it comes through a product.

  So it is prefetched: the pipeline leaves what no product takes in registers.
  """
  tile = load_tile(pointers, seen, EVEN)
  return tile if tile.dtype == tl.float32 else tl.dot(tile, identity.to(tile.dtype))


@triton.jit
def walk_chunk(
  n,
  state,
  pair,
  first_value,
  q_ptr,
  k_ptr,
  v_ptr,
  matrices_ptr,
  gates_ptr,
  o_ptr,
  states_ptr,
  error_ptr,
  passes_ptr,
  residuals_ptr,
  base_o_ptr,
  T,
  chunks,
  last,
  IS_BASE: tl.constexpr,
  DELTA: tl.constexpr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  CLIP: tl.constexpr,
  SAVE: tl.constexpr,
  OUTPUT: tl.constexpr,
  IN_PLACE: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
):
  """One chunk of one of the two states, which it returns as the chunk leaves it.

  DELTA rules also save F of both states, others that of the residual one, which is clipped r. Saved
  states are those before chunks of the walk, of which `last` is the first it does not reach.
  Without OUTPUT, which the base state always has, only the state is wanted. IN_PLACE `base_o` is
  what o takes the place of, else an array laid out as `residuals`.
  """
  SCALE: tl.constexpr = CLIP if residuals_ptr.dtype.element_ty == tl.float16 else 1.0
  READ: tl.constexpr = BASE_IN if IS_BASE else RESIDUAL_READ
  IN: tl.constexpr = BASE_IN if IS_BASE else RESIDUAL_IN
  OUT: tl.constexpr = BASE_OUT if IS_BASE else RESIDUAL_OUT
  WORDS: tl.constexpr = (C + 31) // 32
  MATRICES: tl.constexpr = 3 + 2 * DELTA
  dtype = q_ptr.dtype.element_ty
  i = tl.arange(0, C)
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  start = n * C
  token = pair // H * T + start
  keys = (token * G + pair % H // (H // G)) * K
  values = (token * H + pair % H) * V + first_value
  chunk = pair * chunks + n
  handed = chunk * (V * C) + first_value * C
  is_token = start + i < T
  is_value = first_value + e < V
  key_seen = is_token[:, None] & (a < K)[None, :]
  value_seen = is_token[:, None] & is_value[None, :]
  key_offsets = i[:, None] * (G * K) + a[None, :]
  value_offsets = i[:, None] * (H * V) + e[None, :]
  identity = (i[:, None] == i[None, :]).to(dtype)

  k = load_tile(k_ptr + keys + key_offsets, key_seen, EVEN)
  if OUTPUT:
    q = load_tile(q_ptr + keys + key_offsets, key_seen, EVEN)
  square = matrices_ptr + chunk * (MATRICES * C * C) + i[:, None] * C + i[None, :]
  gates = gates_ptr + chunk * (ROWS * C)
  low = state.to(dtype)
  if IS_BASE:
    if DELTA:
      seen = is_token[None, :] & is_value[:, None]
      v = load_tile(v_ptr + values + i[None, :] * (H * V) + e[:, None], seen, EVEN)
      v = tl.dot(v, identity, input_precision=PRECISION)
    else:
      v = tl.trans(load_tile(v_ptr + values + value_offsets, value_seen, EVEN)).to(tl.float32)
  else:
    square += (1 + DELTA) * C * C
    offsets = e[:, None] * C + i[None, :]
    seen = is_value[:, None]
    v = SCALE * load_handed(residuals_ptr + handed + offsets, seen, EVEN, identity)
  if OUTPUT:
    o = tl.dot(low, tl.trans(q), input_precision=PRECISION)
    o *= tl.load(gates + READ * C + i)[None, :]
  if DELTA or IS_BASE:
    X = tl.dot(low, tl.trans(k), input_precision=PRECISION)
  if DELTA:
    inverse = square + (1 if IS_BASE else 2) * C * C
    y, F = errors(v - tl.load(gates + IN * C + i)[None, :] * X, inverse, PRECISION)
  else:
    y = v.to(matrices_ptr.dtype.element_ty)
    F = v
  if IS_BASE:
    prediction = tl.trans(tl.load(square + (2 + DELTA) * C * C))
    r = v - tl.load(gates + BASE_BEFORE * C + i)[None, :] * X
    r -= tl.dot(y, prediction, input_precision=PRECISION)
    if CLIP is not None:
      if SAVE:
        passes = tl.where(tl.abs(r) < CLIP, 1.0, 0.0).to(dtype)
      r = tl.minimum(tl.maximum(r, -CLIP), CLIP) * (1.0 / SCALE)
    r = r.to(residuals_ptr.dtype.element_ty)
    store_state(residuals_ptr + handed, r, V - first_value, n, C, EVEN)
  write = tl.load(gates + OUT * C + i)[None, :] * F
  decay_all = tl.load(gates + BASE_IN * C + C - 1)
  state = written(write, k, decay_all * state, DELTA, dtype, PRECISION)
  if SAVE and (DELTA or not IS_BASE):
    store_tile(error_ptr + values + value_offsets, tl.trans(F.to(dtype)), value_seen, EVEN)
  if OUTPUT:
    o = tl.dot(y, tl.trans(tl.load(square)), o, input_precision=PRECISION)
  if IS_BASE:
    o = o.to(base_o_ptr.dtype.element_ty)
    if IN_PLACE:
      store_tile(base_o_ptr + values + value_offsets, tl.trans(o), value_seen, EVEN)
    else:
      store_state(base_o_ptr + handed, o, V - first_value, n, C, EVEN)
    if SAVE and CLIP is not None:
      store_bits(passes_ptr + chunk * (WORDS * V) + first_value, e, is_value, passes, V, C)
  elif OUTPUT:
    if IN_PLACE:
      base_o = base_o_ptr + values + i[None, :] * (H * V) + e[:, None]
      o += load_handed(base_o, is_token[None, :] & is_value[:, None], EVEN, identity)
    else:
      o += load_handed(base_o_ptr + handed + offsets, seen, EVEN, identity)
    store_tile(o_ptr + values + value_offsets, tl.trans(o.to(dtype)), value_seen, EVEN)
  if SAVE:
    if (n + 1) % SPAN == 0 and n + 1 < last:
      place = (pair * (chunks // SPAN) + (n + 1) // SPAN) * (K * V) + first_value * K
      store_state(states_ptr + place, state.to(dtype), V - first_value, n, K, EVEN)
  return state


@triton.jit
def store_first(
  states_ptr, state, span, first_value, number, K: tl.constexpr, V: tl.constexpr,
  EVEN: tl.constexpr,
):  # fmt: skip
  """The first of the states that a walk of `number` chunks saves: what it starts from."""
  low = state.to(states_ptr.dtype.element_ty)
  place = span * (K * V) + first_value * K
  store_state(states_ptr + place, low, V - first_value, number, K, EVEN)


@triton.jit
def pair_kernel(
  q_ptr,
  k_ptr,
  v_ptr,
  matrices_ptr,
  gates_ptr,
  base_ptr,
  residual_ptr,
  zeros_ptr,
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
  residuals_ptr,
  base_o_ptr,
  flags_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  HANDED: tl.constexpr,
  DELTA: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  CLIP: tl.constexpr,
  SAVE: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
  STAGES: tl.constexpr,
):
  """Grid (2 * B * H * value tiles,); `flags` starts as zeros (`take_turn`).

  `residuals` (in float16 as shares of the clip's bound) and `base_o` are [B, H, chunks, V, C], and
  are handed over HANDED chunks at a time.
  """
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  follows, walk, flag = take_turn(flags_ptr)
  pair = (walk // TILES).to(tl.int64)
  first_value = walk % TILES * BLOCK_V
  values = V - first_value
  state = pair * (K * V) + first_value
  if follows:
    R = load_transposed(residual_ptr + state, values, K, V, BLOCK_K, BLOCK_V, EVEN)
    if SAVE:
      store_first(residual_states_ptr, R, pair * (chunks // SPAN), first_value, chunks, K, V, EVEN)
    for first in tl.range(0, chunks, HANDED):
      last = tl.minimum(first + HANDED, chunks)
      wait(flag, last)
      for n in tl.range(first, last, num_stages=STAGES):
        R = walk_chunk(
          n, R, pair, first_value, q_ptr, k_ptr, v_ptr, matrices_ptr, gates_ptr, o_ptr,
          residual_states_ptr, residual_error_ptr, passes_ptr, residuals_ptr, base_o_ptr, T, chunks,
          chunks, False, DELTA, H, G, K, V, C, SPAN, BLOCK_K, BLOCK_V, CLIP, SAVE, True, False,
          EVEN, PRECISION,
        )  # fmt: skip
    store_transposed(residual_out_ptr + state, R, values, chunks, K, V, EVEN)
  else:
    S = load_transposed(base_ptr + state, values, K, V, BLOCK_K, BLOCK_V, EVEN)
    if SAVE:
      store_first(states_ptr, S, pair * (chunks // SPAN), first_value, chunks, K, V, EVEN)
    for first in tl.range(0, chunks, HANDED):
      last = tl.minimum(first + HANDED, chunks)
      for n in tl.range(first, last, num_stages=STAGES):
        S = walk_chunk(
          n, S, pair, first_value, q_ptr, k_ptr, v_ptr, matrices_ptr, gates_ptr, o_ptr, states_ptr,
          base_error_ptr, passes_ptr, residuals_ptr, base_o_ptr, T, chunks, chunks,
          True, DELTA, H, G, K, V, C, SPAN, BLOCK_K, BLOCK_V, CLIP, SAVE, True, False,
          EVEN, PRECISION,
        )  # fmt: skip
      post(flag, last)
    store_transposed(base_out_ptr + state, S, values, chunks, K, V, EVEN)
