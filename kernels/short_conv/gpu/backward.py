"""The backward kernel: h and dy read once, dh written once; all else is computed again.

With z the convolution, a = silu(z) or z, n = 1 / sqrt(sum a^2 + eps) of a head and y = s n a:

    da = s n dy - s n^3 (a.dy) a      dz = da silu'(z)      silu'(z) = g + a (1 - g), g = sigmoid(z)
    dh_t = sum_j taps_{W-1-j} dz_{t+j}      dtaps_{W-1-j} = sum_t dz_t h_{t-j}

where t and the other token are of one document. A token's dh is complete W - 1 tokens later, so a
tile also computes dz of the first W - 1 tokens of the next.
"""

import triton
import triton.language as tl

from rla_jax.kernels.short_conv.gpu.tiles import (
  convolved,
  is_one_document,
  kept,
  load_documents,
  load_history,
  load_history_documents,
  load_taps,
  load_tokens,
  place,
  pushed,
  sigmoid,
  zeros_like,
)


@triton.jit
def through_activation(
  z, dy, SILU: tl.constexpr, NORM: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr
):
  """Gradient of the convolution's result z."""
  a = z
  if SILU:
    gate = sigmoid(z)
    a = z * gate
  if NORM:
    inverse = tl.rsqrt(tl.sum(a * a, 1) + EPS)
    scale = SCALE * inverse
    along = scale * inverse * inverse * tl.sum(a * dy, 1)
    dz = scale[:, None] * dy - along[:, None] * a
  else:
    dz = SCALE * dy
  if SILU:
    dz *= gate + a * (1.0 - gate)
  return dz


@triton.jit
def spread(dz, pending, taps, document, documents, LAST: tl.constexpr, SEGMENTED: tl.constexpr):
  """What dz_t adds to dh of t and the LAST = W - 1 tokens before it, whose sums are `pending`.

  Returns all sums; that of the earliest token, the last one, is finished.
  """
  sums = ()
  for j in tl.static_range(LAST + 1):
    part = dz * taps[LAST - j]
    if j > 0:
      if SEGMENTED:
        part = tl.where(document == documents[j - 1], part, 0.0)
      part += pending[j - 1]
    sums = sums + (part,)
  return sums


@triton.jit
def added(dtaps, dz, x, history, WIDTH: tl.constexpr):
  """Gradient of the taps with a further token's part."""
  new = ()
  for j in tl.static_range(WIDTH):
    if j == WIDTH - 1:
      new = new + (dtaps[j] + dz * x,)
    else:
      new = new + (dtaps[j] + dz * history[WIDTH - 2 - j],)
  return new


@triton.jit
def step_back(
  x, dy, document, history, documents, pending, dtaps, taps,
  WIDTH: tl.constexpr, SEGMENTED: tl.constexpr, OWN: tl.constexpr, SILU: tl.constexpr,
  NORM: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
  """One token. Returns dh of the token W - 1 before it, and what is carried to the next.

  Not OWN: a token of the next tile, which counts it in its own dtaps.
  """
  LAST: tl.constexpr = WIDTH - 1
  if SEGMENTED:
    history = kept(history, document == documents[0], LAST)
  dz = through_activation(convolved(x, history, taps, WIDTH), dy, SILU, NORM, SCALE, EPS)
  if OWN:
    dtaps = added(dtaps, dz, x, history, WIDTH)
  sums = spread(dz, pending, taps, document, documents, LAST, SEGMENTED)
  if SEGMENTED:
    documents = pushed(document, documents, LAST)
  return sums[LAST], pushed(x, history, LAST), documents, sums[:LAST], dtaps


@triton.jit
def walk_backward(
  h_ptr, tail_ptr, documents_ptr, dy_ptr, dh_ptr, dtail_ptr, taps, batch, start, T, channel, seen,
  X: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
  TAIL: tl.constexpr, SEGMENTED: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr,
  SCALE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
  """The tokens of a tile, GROUP of them read at a time. Returns its part of dtaps."""
  LAST: tl.constexpr = WIDTH - 1
  row = batch * T
  history = load_history(
    h_ptr, tail_ptr, documents_ptr, row, batch, start, channel, seen, X, WIDTH, TAIL, SEGMENTED
  )
  documents = load_history_documents(documents_ptr, row, start, WIDTH, SEGMENTED)
  dtaps = zeros_like(taps, WIDTH)
  pending = zeros_like(taps, LAST)
  for first in range(start, start + TOKENS, GROUP):
    xs = load_tokens(h_ptr, row, first, T, channel, seen, X, GROUP)
    dys = load_tokens(dy_ptr, row, first, T, channel, seen, X, GROUP)
    new = load_documents(documents_ptr, row, first, T, GROUP, SEGMENTED)
    for i in tl.static_range(GROUP):
      dh, history, documents, pending, dtaps = step_back(
        xs[i].to(tl.float32), dys[i].to(tl.float32), new[i],
        history, documents, pending, dtaps, taps,
        WIDTH, SEGMENTED, True, SILU, NORM, SCALE, EPS,
      )  # fmt: skip
      t = first + i - LAST
      own = seen & (t >= start) & (t < T)
      tl.store(dh_ptr + (row + t) * X + channel, dh.to(dh_ptr.dtype.element_ty), mask=own)
      if TAIL:
        dtail = dh.to(dtail_ptr.dtype.element_ty)
        tl.store(dtail_ptr + (batch * LAST + first + i) * X + channel, dtail, mask=seen & (t < 0))
  first = start + TOKENS
  xs = load_tokens(h_ptr, row, first, T, channel, seen, X, LAST)
  dys = load_tokens(dy_ptr, row, first, T, channel, seen, X, LAST)
  new = load_documents(documents_ptr, row, first, T, LAST, SEGMENTED)
  for i in tl.static_range(LAST):
    dh, history, documents, pending, dtaps = step_back(
      xs[i].to(tl.float32), dys[i].to(tl.float32), new[i],
      history, documents, pending, dtaps, taps,
      WIDTH, SEGMENTED, False, SILU, NORM, SCALE, EPS,
    )  # fmt: skip
    t = first + i - LAST
    dh = dh.to(dh_ptr.dtype.element_ty)
    tl.store(dh_ptr + (row + t) * X + channel, dh, mask=seen & (t < T))
  return dtaps


@triton.jit
def backward_kernel(
  h_ptr,
  taps_ptr,
  tail_ptr,
  documents_ptr,
  dy_ptr,
  T,
  tiles,
  dh_ptr,
  dtaps_ptr,
  dtail_ptr,
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
):
  """Grid (B * tiles * head tiles,). Every tile writes its part of dtaps: [B, tiles, W, X]."""
  batch, tile, channel, seen = place(tiles, H, S, BLOCK_H, BLOCK_S)
  start = tile * TOKENS
  X: tl.constexpr = H * S
  if ROW_TAPS:
    taps_ptr += batch * WIDTH * X
  taps = load_taps(taps_ptr, channel, seen, X, WIDTH)
  # Most tiles lie in one document and need no selects.
  is_mixed = False
  if SEGMENTED:
    reach: tl.constexpr = TOKENS + WIDTH - 1
    is_mixed = not is_one_document(documents_ptr, batch * T, start, T, WIDTH, reach)
  if is_mixed:
    dtaps = walk_backward(
      h_ptr, tail_ptr, documents_ptr, dy_ptr, dh_ptr, dtail_ptr, taps, batch, start, T, channel,
      seen, X, WIDTH, TOKENS, GROUP, TAIL, SEGMENTED, SILU, NORM, SCALE, EPS,
    )  # fmt: skip
  else:
    dtaps = walk_backward(
      h_ptr, tail_ptr, documents_ptr, dy_ptr, dh_ptr, dtail_ptr, taps, batch, start, T, channel,
      seen, X, WIDTH, TOKENS, GROUP, TAIL, False, SILU, NORM, SCALE, EPS,
    )  # fmt: skip
  part = (batch * tiles + tile) * WIDTH * X + channel
  for j in tl.static_range(WIDTH):
    tl.store(dtaps_ptr + part + j * X, dtaps[j], mask=seen)
