"""The forward kernel: h read once, y written once."""

import triton
import triton.language as tl

from rla_jax.kernels.short_conv.gpu.tiles import (
  convolved,
  heads_of,
  is_one_document,
  kept,
  load_documents,
  load_history,
  load_taps,
  load_tokens,
  place,
  pushed,
  sigmoid,
)


@triton.jit
def walk_forward(
  h_ptr, tail_ptr, documents_ptr, y_ptr, faults_ptr, taps, batch, start, T, channel, seen,
  H: tl.constexpr, S: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr,
  TOKENS: tl.constexpr, GROUP: tl.constexpr, TAIL: tl.constexpr, SEGMENTED: tl.constexpr,
  SILU: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
  SHIELD: tl.constexpr,
):  # fmt: skip
  """The tokens of a tile, GROUP of them read at a time."""
  X: tl.constexpr = H * S
  row = batch * T
  head = heads_of(H, BLOCK_H)
  history = load_history(
    h_ptr, tail_ptr, documents_ptr, row, batch, start, channel, seen, X, WIDTH, TAIL, SEGMENTED
  )
  last = 0
  if SEGMENTED:
    last = tl.load(documents_ptr + row + start)
  for first in range(start, start + TOKENS, GROUP):
    inputs = load_tokens(h_ptr, row, first, T, channel, seen, X, GROUP)
    documents = load_documents(documents_ptr, row, first, T, GROUP, SEGMENTED)
    for i in tl.static_range(GROUP):
      if SEGMENTED:
        history = kept(history, documents[i] == last, WIDTH - 1)
        last = documents[i]
      x = inputs[i].to(tl.float32)
      y = convolved(x, history, taps, WIDTH)
      history = pushed(x, history, WIDTH - 1)
      if SILU:
        y *= sigmoid(y)
      if NORM:
        square = tl.sum(y * y, 1)
        y *= (SCALE * tl.rsqrt(square + EPS))[:, None]
      else:
        y *= SCALE
      t = first + i
      y = y.to(y_ptr.dtype.element_ty)
      if SHIELD:
        if NORM:
          fault = tl.where(square < float('inf'), 0, 1)
        else:
          fault = tl.max(tl.where(tl.abs(y.to(tl.float32)) < float('inf'), 0, 1), 1)
        y = tl.where(fault[:, None] == 0, y, 0.0)
        at = faults_ptr + (row + t) * H + head
        tl.store(at, fault.to(tl.int8), mask=(head < H) & (t < T))
      tl.store(y_ptr + (row + t) * X + channel, y, mask=seen & (t < T))


@triton.jit
def forward_kernel(
  h_ptr,
  taps_ptr,
  tail_ptr,
  documents_ptr,
  T,
  tiles,
  y_ptr,
  faults_ptr,
  H: tl.constexpr,
  S: tl.constexpr,
  BLOCK_H: tl.constexpr,
  BLOCK_S: tl.constexpr,
  WIDTH: tl.constexpr,
  ROW_TAPS: tl.constexpr,
  TOKENS: tl.constexpr,
  GROUP: tl.constexpr,
  TAIL: tl.constexpr,
  SEGMENTED: tl.constexpr,
  SILU: tl.constexpr,
  NORM: tl.constexpr,
  SCALE: tl.constexpr,
  EPS: tl.constexpr,
  SHIELD: tl.constexpr,
):
  """Grid (B * tiles * head tiles,). Without ROW_TAPS all sequences share their taps."""
  batch, tile, channel, seen = place(tiles, H, S, BLOCK_H, BLOCK_S)
  start = tile * TOKENS
  X: tl.constexpr = H * S
  if ROW_TAPS:
    taps_ptr += batch * WIDTH * X
  taps = load_taps(taps_ptr, channel, seen, X, WIDTH)
  # Most tiles lie in one document and need no selects.
  is_mixed = False
  if SEGMENTED:
    is_mixed = not is_one_document(documents_ptr, batch * T, start, T, WIDTH, TOKENS)
  if is_mixed:
    walk_forward(
      h_ptr, tail_ptr, documents_ptr, y_ptr, faults_ptr, taps, batch, start, T, channel, seen,
      H, S, BLOCK_H, WIDTH, TOKENS, GROUP, TAIL, SEGMENTED, SILU, NORM, SCALE, EPS, SHIELD,
    )  # fmt: skip
  else:
    walk_forward(
      h_ptr, tail_ptr, documents_ptr, y_ptr, faults_ptr, taps, batch, start, T, channel, seen,
      H, S, BLOCK_H, WIDTH, TOKENS, GROUP, TAIL, False, SILU, NORM, SCALE, EPS, SHIELD,
    )  # fmt: skip
