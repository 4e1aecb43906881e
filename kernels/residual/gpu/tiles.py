"""Device functions that the kernels share: loads, stores, and decays inside a chunk."""

import triton
import triton.language as tl

# Rows of the gate array [B, H, N, GATES, C] that `prepare` writes: decays from the chunk's start
# through token i (IN), without i's own (BEFORE), and from i to the chunk's end, times its gate
# (OUT); 1 / gate (UNDO). The residual state reads rows of its own, so that none stays in registers
# for both.
BASE_IN = tl.constexpr(0)
BASE_BEFORE = tl.constexpr(1)
BASE_OUT = tl.constexpr(2)
BASE_UNDO = tl.constexpr(3)
RESIDUAL_IN = tl.constexpr(4)
RESIDUAL_READ = tl.constexpr(5)  # IN times gamma
RESIDUAL_OUT = tl.constexpr(6)
RESIDUAL_UNDO = tl.constexpr(7)
GATES = 8

LOG2_E = tl.constexpr(1.4426950408889634)
# exp(-64) is 1e-28: a decay below counts as a full reset, so that cumulative sums stay finite.
RESET = tl.constexpr(-64.0)


@triton.jit
def fresh(indices, number):
  """`indices`, as if they depended on `number`, which is below 2^30.

  What a loop computes from them stays inside, where it would be computed once before the loop and
  held in registers that the products need.
  """
  return indices + (number >> 30)


@triton.jit
def load_tile(pointers, mask, EVEN: tl.constexpr):
  """Loads a tile; EVEN promises that nothing needs masking."""
  return tl.load(pointers) if EVEN else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(pointers, tile, mask, EVEN: tl.constexpr):
  """Stores a tile; EVEN promises that nothing needs masking."""
  if EVEN:
    tl.store(pointers, tile)
  else:
    tl.store(pointers, tile, mask=mask)


@triton.jit
def part_chunks(sequence, chunks, SPAN: tl.constexpr, SPLIT: tl.constexpr):
  """First chunk, and the one behind the last, of part sequence % SPLIT of a sequence."""
  part = sequence % SPLIT
  each = tl.cdiv(chunks // SPAN, SPLIT) * SPAN
  return tl.minimum(part * each, chunks), tl.minimum((part + 1) * each, chunks)


@triton.jit
def load_columns(
  pointer, rows, columns, first, row_seen, COLUMNS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
  """Columns first .. of a matrix whose row offsets are `rows`; zero beyond COLUMNS."""
  columns += first
  seen = row_seen[:, None] & (columns < COLUMNS)[None, :]
  return load_tile(pointer + rows[:, None] + columns[None, :], seen, EVEN)


@triton.jit
def load_transposed(
  pointer, values, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
  EVEN: tl.constexpr,
):  # fmt: skip
  """A state as it comes into a call, [K, V], as [values, keys]; zero beyond K and `values`."""
  a = tl.arange(0, BLOCK_K)
  e = tl.arange(0, BLOCK_V)
  seen = (a < K)[None, :] & (e < values)[:, None]
  return load_tile(pointer + a[None, :] * V + e[:, None], seen, EVEN)


@triton.jit
def store_transposed(
  pointer, state, values, number, K: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr
):
  """Stores such a state behind a loop of `number` chunks.

  With offsets of its own: those of the load would stay in registers throughout the loop.
  """
  a = fresh(tl.arange(0, state.shape[1]), number)
  e = tl.arange(0, state.shape[0])
  seen = (a < K)[:, None] & (e < values)[None, :]
  store_tile(pointer + a[:, None] * V + e[None, :], tl.trans(state), seen, EVEN)


@triton.jit
def load_state(pointer, values, keys, K: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr):
  """Rows `values` of a state as it is stored, [V, K]; zero beyond V and K."""
  return load_columns(pointer, values * K, keys, 0, values < V, K, EVEN)


@triton.jit
def store_state(pointer, state, rows, number, K: tl.constexpr, EVEN: tl.constexpr):
  """Stores `rows` rows of a state [values, keys], in a loop of which this is iteration `number`.

  A warp holds 16 rows whole. As a tile [values, keys], Triton would store them by other warps, for
  which all wait four times; of these dimensions the first two that are left behind the keys go to
  lanes and then to warps, so that each stores its own: RLA's saving forward pass takes 0.54 ms in
  place of 0.59 (4 x 8192 tokens, 16 heads of 128, on an H200).
  """
  N: tl.constexpr = state.shape[0]
  BLOCK_K: tl.constexpr = state.shape[1]
  LANES: tl.constexpr = max(1, min(16, 256 // BLOCK_K))  # rows that one warp stores at a time
  x = tl.reshape(state, (N // 16, 16 // LANES, LANES, BLOCK_K))
  lane = tl.arange(0, LANES)[:, None, None, None]
  warp = fresh(tl.arange(0, N // 16), number)[None, :, None, None]
  turn = tl.arange(0, 16 // LANES)[None, None, :, None]
  row = warp * 16 + turn * LANES + lane
  key = tl.arange(0, BLOCK_K)[None, None, None, :]
  seen = (row < rows) & (key < K)
  store_tile(pointer + (row * K + key), tl.permute(x, (2, 0, 1, 3)), seen, EVEN)


@triton.jit
def store_bits(pointer, rows, row_seen, tile, V: tl.constexpr, C: tl.constexpr):
  """Stores a tile [rows, C] of 0 and 1 as bits of int32, words of 32 tokens V apart.

  By a product with powers of two, which is exact and gives the halves of words: a sum along the
  tokens would take the tile through shared memory first. Of chunks of 16 the upper halves stay as
  they were, and are not looked at.
  """
  i = tl.arange(0, C)
  half = tl.arange(0, 16)
  powers = tl.where(i[:, None] // 16 == half[None, :], (1 << (i % 16))[:, None], 0).to(tile.dtype)
  bits = tl.dot(tile, powers, input_precision='tf32x3').to(tl.int32).to(tl.int16)
  halves = pointer.to(tl.pointer_type(tl.int16), bitcast=True)
  halves += (half // 2 * V * 2 + half % 2)[None, :] + rows[:, None] * 2
  tl.store(halves, bits, mask=row_seen[:, None] & (half < C // 16)[None, :])


@triton.jit
def load_bits(pointer, rows, row_seen, V: tl.constexpr, C: tl.constexpr):
  """What `store_bits` was given, as tokens of 0 and 1."""
  i = tl.arange(0, C)
  tile = tl.zeros([rows.shape[0], C], tl.int32)
  for word in tl.static_range((C + 31) // 32):
    bits = tl.load(pointer + word * V + rows, mask=row_seen, other=0)
    here = (bits[:, None] >> (i % 32)[None, :]) & 1
    tile = here if C <= 32 else tl.where((i // 32 == word)[None, :], here, tile)
  return tile


@triton.jit
def scaled(gate, tile):
  """Rows of a tile times a gate, in the tile's dtype."""
  return (gate[:, None] * tile.to(tl.float32)).to(tile.dtype)


@triton.jit
def not_zero(gate):
  """A gate, or 1e-18 where it is closer to zero than that."""
  return tl.where(tl.abs(gate) < 1e-18, 1e-18, gate)


@triton.jit
def load_decays(
  log_decay_ptr, segments_ptr, batch, head, start, T, i, H: tl.constexpr, SEGMENTED: tl.constexpr
):  # fmt: skip
  """Log decays of tokens start + i of a head, and 1 where a new segment begins."""
  first = batch * T + start
  log_decay = tl.load(log_decay_ptr + (first * H + head) + i * H, mask=start + i < T, other=0.0)
  is_new = tl.zeros_like(i)
  if SEGMENTED:
    segments_ptr += batch * T
    tokens = tl.minimum(start + i, T)
    segment = tl.load(segments_ptr + tl.minimum(tokens, T - 1))
    before = tl.load(segments_ptr + tl.maximum(tokens - 1, 0))
    is_new = (segment != before).to(tl.int32)
  return log_decay, is_new


@triton.jit
def chunk_decays(log_decay, is_new, SEGMENTED: tl.constexpr):
  """Cumulative log2 decays of a chunk from what `load_decays` returned.

  Returns (G, Gx, era, erax, is_reset): the sum through token i and before it, and the number of
  resets, by a decay of zero or by a new segment, that the state and the prediction have seen.
  Two tokens see each other only in the same era.
  """
  is_reset = log_decay < RESET
  log_decay = tl.where(is_reset, 0.0, log_decay) * LOG2_E
  G = tl.cumsum(log_decay, 0)
  resets = is_reset.to(tl.int32)
  if SEGMENTED:
    resets = resets * (1 - is_new)
    era = tl.cumsum(resets + is_new, 0)
  else:
    era = tl.cumsum(resets, 0)
  return G, G - log_decay, era, era - resets, is_reset


@triton.jit
def decay_in(G, era):
  """exp(G): what is left at each token of the state before the chunk, 0 from a reset on."""
  return tl.exp2(tl.where(era == 0, G, float('-inf')))


@triton.jit
def decay_out(G, era, C: tl.constexpr):
  """exp(G_C - G): what the chunk's end sees of each token."""
  is_last = tl.arange(0, C) == C - 1
  last = tl.sum(tl.where(is_last, G, 0.0), 0)
  last_era = tl.sum(tl.where(is_last, era, 0), 0)
  return tl.exp2(tl.where(era == last_era, last - G, float('-inf')))


@triton.jit
def decay_between(G_to, era_to, G_from, era_from, INCLUSIVE: tl.constexpr, C: tl.constexpr):
  """exp(G_i - G_j) for i >= j (or i > j) of one era, else 0: the matrices L and Lx.

  What is not seen is pushed below every exponent by sums: comparisons of all pairs would be kept
  for each other, bit by bit. Eras never fall, and logs are above -64 C log2(e) > -FAR.
  """
  FAR: tl.constexpr = 16384.0
  place = tl.arange(0, C).to(tl.float32) * FAR
  reach = place if INCLUSIVE else place - FAR
  era_to, era_from = era_to.to(tl.float32) * FAR, era_from.to(tl.float32) * FAR
  far = tl.minimum(reach[:, None] - place[None, :], era_from[None, :] - era_to[:, None])
  return tl.exp2((G_to[:, None] - G_from[None, :]) + far)
