"""Device functions that both kernels share: places, loads, the convolution, the activation.

A program walks the tokens of a tile with the last W - 1 inputs in registers, so every input is read
once. Tuples hold one [heads, size] block of numbers for each token or tap.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def heads_of(H: tl.constexpr, BLOCK_H: tl.constexpr):
  """Heads of a program."""
  columns: tl.constexpr = tl.cdiv(H, BLOCK_H)
  return tl.program_id(0) % columns * BLOCK_H + tl.arange(0, BLOCK_H)


@triton.jit
def place(
  tiles, H: tl.constexpr, S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
  """Sequence, tile of tokens and channels of a program; neighbours have neighbouring channels."""
  program = tl.program_id(0).to(tl.int64)
  columns: tl.constexpr = tl.cdiv(H, BLOCK_H)
  head = heads_of(H, BLOCK_H)
  size = tl.arange(0, BLOCK_S)
  seen = (head < H)[:, None] & (size < S)[None, :]
  row = program // columns
  return row // tiles, (row % tiles).to(tl.int32), head[:, None] * S + size[None, :], seen


@triton.jit
def load_taps(taps_ptr, channel, seen, X: tl.constexpr, WIDTH: tl.constexpr):
  """The taps, that of the current token last."""
  taps = ()
  for j in tl.static_range(WIDTH):
    taps = taps + (tl.load(taps_ptr + j * X + channel, mask=seen, other=0.0),)
  return taps


@triton.jit
def load_tokens(ptr, row, first, T, channel, seen, X: tl.constexpr, COUNT: tl.constexpr):
  """COUNT tokens from `first` on, zeros behind the last; together, so that one wait is enough."""
  tokens = ()
  for i in tl.static_range(COUNT):
    t = first + i
    tokens = tokens + (tl.load(ptr + (row + t) * X + channel, mask=seen & (t < T), other=0.0),)
  return tokens


@triton.jit
def load_documents(ptr, row, first, T, COUNT: tl.constexpr, SEGMENTED: tl.constexpr):
  """Their documents, -1 behind the last; without documents only 0."""
  documents = ()
  for i in tl.static_range(COUNT):
    t = first + i
    if SEGMENTED:
      documents = documents + (tl.load(ptr + row + t, mask=t < T, other=-1),)
    else:
      documents = documents + (0,)
  return documents


@triton.jit
def load_history(
  h_ptr, tail_ptr, documents_ptr, row, batch, start, channel, seen,
  X: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
  """The W - 1 inputs before `start`, the latest first; zeros for those of another document.

  Before the first token there is the tail of the call before, of document 0.
  """
  history = ()
  for j in tl.static_range(1, WIDTH):
    t = start - j
    own = t >= 0
    if SEGMENTED:
      current = tl.load(documents_ptr + row + start)
      own = own & (tl.load(documents_ptr + row + tl.maximum(t, 0)) == current)
    x = tl.load(h_ptr + (row + t) * X + channel, mask=seen & own, other=0.0).to(tl.float32)
    if TAIL:
      at = (batch * (WIDTH - 1) + WIDTH - 1 + t) * X
      x += tl.load(tail_ptr + at + channel, mask=seen & (t < 0), other=0.0).to(tl.float32)
    history = history + (x,)
  return history


@triton.jit
def load_history_documents(
  documents_ptr, row, start, WIDTH: tl.constexpr, SEGMENTED: tl.constexpr
):
  """Documents of those inputs, also of the ones that were left out."""
  documents = ()
  for j in tl.static_range(1, WIDTH):
    if SEGMENTED:
      document = tl.load(documents_ptr + row + tl.maximum(start - j, 0))
      documents = documents + (document,)
  return documents


@triton.jit
def is_one_document(
  documents_ptr, row, start, T, WIDTH: tl.constexpr, REACH: tl.constexpr
):
  """Whether all tokens from the history before `start` to `start + REACH` are of one document."""
  first = tl.load(documents_ptr + row + tl.maximum(start - (WIDTH - 1), 0))
  return first == tl.load(documents_ptr + row + tl.minimum(start + REACH, T) - 1)


@triton.jit
def zeros_like(blocks, LENGTH: tl.constexpr):
  """Zeros like the first LENGTH blocks."""
  zeros = ()
  for j in tl.static_range(LENGTH):
    zeros = zeros + (tl.zeros_like(blocks[j]),)
  return zeros


@triton.jit
def kept(history, keep, LENGTH: tl.constexpr):
  """The history, or zeros where it is of another document: a select, as it may be NaN."""
  new = ()
  for j in tl.static_range(LENGTH):
    new = new + (tl.where(keep, history[j], 0.0),)
  return new


@triton.jit
def pushed(x, history, LENGTH: tl.constexpr):
  """The history with x as its latest."""
  new = ()
  for j in tl.static_range(LENGTH):
    if j == 0:
      new = new + (x,)
    else:
      new = new + (history[j - 1],)
  return new


@triton.jit
def convolved(x, history, taps, WIDTH: tl.constexpr):
  """The convolution at the token whose input is x."""
  z = x * taps[WIDTH - 1]
  for j in tl.static_range(1, WIDTH):
    z += history[j - 1] * taps[WIDTH - 1 - j]
  return z


@triton.jit
def sigmoid(z):
  """1 / (1 + exp(-z)), without the four instructions by which a division guards its range."""
  root = tl.rsqrt(1.0 + tl.exp2(z * -LOG2_E))
  return root * root
