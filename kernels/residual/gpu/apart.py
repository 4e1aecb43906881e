"""Kernel B with the states one after the other, a launch each: of parts, or of large heads.

Where a sequence is walked in parts, what a state is at the end of a part has to be known before the
outputs of the next are. With both states in a program that takes three walks through the base
state: for its ends, for the residual state's, and for outputs. Apart it takes two of each state:
the base state's second walk hands residuals over, as in `pair`, and leaves its part of the output
where the whole is to be. Of heads of 256 the registers hold one state and not two.
"""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.pair import store_first, walk_chunk
from rla_jax.kernels.residual.gpu.tiles import load_transposed, part_chunks, store_transposed


@triton.jit
def walk_part(
  q_ptr,
  k_ptr,
  v_ptr,
  matrices_ptr,
  gates_ptr,
  state_ptr,
  T,
  chunks,
  o_ptr,
  state_out_ptr,
  states_ptr,
  error_ptr,
  passes_ptr,
  residuals_ptr,
  base_o_ptr,
  IS_BASE: tl.constexpr,
  DELTA: tl.constexpr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  SPLIT: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  CLIP: tl.constexpr,
  SAVE: tl.constexpr,
  OUTPUT: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
  STAGES: tl.constexpr,
):
  """The chunks of a part with one state; grid (B * H * SPLIT * value tiles,)."""
  TILES: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
  sequence = tl.program_id(0) // TILES
  first, last = part_chunks(sequence, chunks, SPAN, SPLIT)
  if OUTPUT:
    tl.assume(last > first)
  else:
    last = tl.where(sequence % SPLIT == SPLIT - 1, first, last)
  pair = (sequence // SPLIT).to(tl.int64)
  first_value = tl.program_id(0) % TILES * BLOCK_V
  values = V - first_value
  place = sequence.to(tl.int64) * (K * V) + first_value
  state = load_transposed(state_ptr + place, values, K, V, BLOCK_K, BLOCK_V, EVEN)
  if SAVE:
    span = pair * (chunks // SPAN) + first // SPAN
    store_first(states_ptr, state, span, first_value, chunks, K, V, EVEN)
  for n in tl.range(first, last, num_stages=STAGES):
    state = walk_chunk(
      n, state, pair, first_value, q_ptr, k_ptr, v_ptr, matrices_ptr, gates_ptr, o_ptr, states_ptr,
      error_ptr, passes_ptr, residuals_ptr, base_o_ptr, T, chunks, last,
      IS_BASE, DELTA, H, G, K, V, C, SPAN, BLOCK_K, BLOCK_V, CLIP, SAVE, OUTPUT, True, EVEN,
      PRECISION,
    )  # fmt: skip
  store_transposed(state_out_ptr + place, state, values, chunks, K, V, EVEN)


@triton.jit
def base_part_kernel(
  q_ptr,
  k_ptr,
  v_ptr,
  matrices_ptr,
  gates_ptr,
  base_ptr,
  T,
  chunks,
  base_out_ptr,
  states_ptr,
  base_error_ptr,
  passes_ptr,
  residuals_ptr,
  base_o_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  SPLIT: tl.constexpr,
  DELTA: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  CLIP: tl.constexpr,
  SAVE: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
  STAGES: tl.constexpr,
):
  """The base state's walk of a part, which hands over `residuals` and `base_o` as in `pair`."""
  walk_part(
    q_ptr, k_ptr, v_ptr, matrices_ptr, gates_ptr, base_ptr, T, chunks, base_o_ptr, base_out_ptr,
    states_ptr, base_error_ptr, passes_ptr, residuals_ptr, base_o_ptr,
    True, DELTA, H, G, K, V, C, SPAN, SPLIT, BLOCK_K, BLOCK_V, CLIP, SAVE, True, EVEN, PRECISION,
    STAGES,
  )  # fmt: skip


@triton.jit
def residual_part_kernel(
  q_ptr,
  k_ptr,
  matrices_ptr,
  gates_ptr,
  residual_ptr,
  residuals_ptr,
  base_o_ptr,
  T,
  chunks,
  o_ptr,
  residual_out_ptr,
  residual_states_ptr,
  residual_error_ptr,
  H: tl.constexpr,
  G: tl.constexpr,
  K: tl.constexpr,
  V: tl.constexpr,
  C: tl.constexpr,
  SPAN: tl.constexpr,
  SPLIT: tl.constexpr,
  DELTA: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  CLIP: tl.constexpr,
  SAVE: tl.constexpr,
  OUTPUT: tl.constexpr,
  EVEN: tl.constexpr,
  PRECISION: tl.constexpr,
  STAGES: tl.constexpr,
):
  """The residual state's walk behind it. Without OUTPUT the last part, whose end nobody asks for,
  is left out.
  """
  walk_part(
    q_ptr, k_ptr, o_ptr, matrices_ptr, gates_ptr, residual_ptr, T, chunks, o_ptr, residual_out_ptr,
    residual_states_ptr, residual_error_ptr, o_ptr, residuals_ptr, base_o_ptr,
    False, DELTA, H, G, K, V, C, SPAN, SPLIT, BLOCK_K, BLOCK_V, CLIP, SAVE, OUTPUT, EVEN,
    PRECISION, STAGES,
  )  # fmt: skip
