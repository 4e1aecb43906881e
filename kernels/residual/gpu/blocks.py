"""Block sizes of the Triton kernels: a frozen record, a heuristic, and a tuned table per card."""

import dataclasses
import functools
import json
import pathlib
import re

import jax.numpy as jnp

MULTIPROCESSORS = 132  # of an H100 or H200
SHORTEST_PART = 8  # spans of a part of a sequence that is split
SHORTEST_PAIR = 1024  # tokens of a sequence that a pair walks; by arithmetic, not measured
WALKS = ('both', 'pair', 'apart')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Launch of one kernel: value columns of a tile, warps of a program, depth of its pipeline."""

  value: int
  warps: int
  stages: int


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Block sizes of one call.

  Attributes:
    chunk: tokens of a chunk of the sequential kernels, 16, 32 or 64.
    span: chunks from one saved state to the next; `queries` and `keys` work on chunk * span tokens.
    prepare: launch of what needs neither values nor states (its value tile is not used).
    forward: launch of the forward pass, both states in one program.
    sweep: launch of the sequential part of the backward pass, one state a program.
    queries: launch of the first half of its parallel part.
    keys: launch of the second half.
    pieces: parts of the sequence that the backward pass handles one after the other: more pieces
      hold less memory.
    bits_last: whether the forward pass stores the clip's bits at the end of a chunk: what is right
      for tiles of 64 costs registers with others. (Pairs store them as they come.)
    pair: launch of the forward pass with a program a state, in place of `forward` where heads do
      not fill a device even so, or sequences are walked in parts (`walk_of`); None for never.
    apart: whether many heads, too, are walked with a program a state, one after the other.
    looped: whether `keys` takes each product in a loop of its own if it has eight warps, which
      spares registers where there is no wgmma.
    fill: programs a multiprocessor that a walk is to have, by parts of the sequence, or of a piece,
      that are walked side by side (`sequence_split`); 0 for sequences as a whole.
    split: so many parts whatever the heads that a device holds; None for what `fill` comes to.
    walk: one of WALKS, whatever the heads; None for what `walk_of` says.
  """

  chunk: int
  span: int
  prepare: Kernel
  forward: Kernel
  sweep: Kernel
  queries: Kernel
  keys: Kernel
  pieces: int
  bits_last: bool = False
  pair: Kernel | None = None
  apart: bool = False
  looped: bool = False
  fill: int = 2
  split: int | None = None
  walk: str | None = None

  @classmethod
  def from_json(cls, record: dict) -> 'Blocks':
    """Reads what `dataclasses.asdict` wrote."""
    kernels = {n: Kernel(**x) for n, x in record.items() if isinstance(x, dict)}
    return cls(**(record | kernels))


def sequence_split(programs: int, spans: int, *, fill: int) -> int:
  """Parts of a sequence to walk side by side, where heads alone do not fill a card.

  Parts have a price, in time of the walk itself: what each leaves is found beforehand, for one
  state after the other, and for the delta rule also how it maps a state. So it takes four of them
  to gain anything.

  Args:
    programs: of a kernel that walks whole sequences.
    spans: of the sequence.
    fill: programs a multiprocessor that there are to be.
  """
  wanted = fill * MULTIPROCESSORS // programs
  parts = min(wanted, spans // SHORTEST_PART)
  return parts if parts >= 4 and 2 * programs <= MULTIPROCESSORS else 1


def parts(chosen: Blocks, walk: Kernel, *, value_dim: int, heads: int, spans: int) -> int:
  """Parts of so many spans that a kernel walks side by side for a device's heads; none is empty."""
  programs = heads * -(-value_dim // walk.value)
  wanted = chosen.split or sequence_split(programs, spans, fill=chosen.fill)
  return -(-spans // -(-spans // min(wanted, spans)))


def with_chunk(chosen: Blocks, chunk: int, span: int) -> Blocks:
  """The record with chunks of a size that it was not chosen for.

  With 64 tokens deep pipelines do not fit the shared memory, nor `prepare` the registers of a warp
  or two.
  """
  change = dataclasses.replace
  chosen = change(chosen, chunk=chunk, span=span)
  if chunk < 64:
    return chosen
  walks = {name: getattr(chosen, name) for name in ('forward', 'sweep', 'pair')}
  walks = {n: change(k, stages=min(2, k.stages)) for n, k in walks.items() if k is not None}
  return change(chosen, **walks, prepare=Kernel(0, 4, 1))


def split_launch(chosen: Blocks) -> Kernel:
  """What walks a sequence in the forward pass if it is walked in parts."""
  return chosen.forward if chosen.pair is None or chosen.walk == 'both' else chosen.pair


def walk_of(chosen: Blocks, *, value_dim: int, heads: int, split: int) -> str:
  """How the forward pass walks two states for a device's heads.

  Returns:
    'both' in one program (launch `forward`; so is one state alone), in a 'pair' of programs side
    by side (launch `pair`) if all of them run at once, or 'apart', one after the other (likewise).
  """
  if chosen.walk is not None:
    return chosen.walk
  if chosen.pair is None:
    return 'both'
  if split > 1:
    return 'apart'
  if heads * -(-value_dim // chosen.pair.value) <= MULTIPROCESSORS:
    return 'pair'
  return 'apart' if chosen.apart else 'both'


def heuristic(
  *, delta: bool, residual: bool, key_dim: int, value_dim: int, dtype, heads: int, length: int,
  hopper: bool = True,
) -> Blocks:  # fmt: skip
  """Block sizes for a call of `heads` (batch times heads) sequences of `length` tokens.

  Those of a Hopper are as measured on an H200; for other cards they are the widest of which no
  register spills (or, of large heads, few do), by the compiler's report: nobody has timed them
  there.
  """
  is_float32 = jnp.dtype(dtype).itemsize == 4
  # A warp holds 16 value columns of a state whole, so smaller tiles save no registers: 64 columns
  # are what wgmma wants. It cannot serve float32.
  tile = 16 if is_float32 else max(16, min(64, 1 << (value_dim - 1).bit_length()))
  walks = heads * -(-value_dim // tile)
  # Of two states as few as keep the peak of forward and backward within twice the bytes of q, k, v,
  # o and their gradients, for heads of 128; one state has room for 2.
  pieces = {(True, True): 4, (False, True): 3}.get((delta, residual), 2) if length >= 512 else 1
  if 2 * walks <= MULTIPROCESSORS:
    pieces = min(pieces, max(1, length // 4096))  # a piece is to be long enough to be split
  # One program a multiprocessor waits for itself.
  is_alone = tile == 64 and MULTIPROCESSORS < 2 * walks <= 2 * MULTIPROCESSORS
  is_short = length < SHORTEST_PAIR
  if is_float32:
    launches = _small_chunks(tile)
  elif key_dim > 128:
    launches = _large_heads(tile, is_alone, delta, residual) if hopper else _small_chunks(tile)
    if residual:  # The registers hold two states of up to 128 keys, of more they hold one.
      pair = Kernel(tile, tile // 16, 2)
      launches |= {'pair': pair, 'apart': True, 'walk': 'apart' if is_short else None}
  elif hopper:
    launches = _usual_heads(tile, is_alone, is_short, delta, residual)
  else:
    launches = _usual_heads_before_hopper(tile)
  common = {'span': 2, 'pieces': pieces, 'fill': 2 if delta else 4}
  return Blocks(**common | launches, looped=is_float32 or not hopper)


def _usual_heads(tile, is_alone, is_short, delta, residual) -> dict:
  """What heads of up to 128 keys take on a Hopper."""
  loop = Kernel(tile, tile // 16, 2)
  deep = dataclasses.replace(loop, stages=3)
  rdn = delta and residual
  # Two programs, with a state each, wait for each other: the walk takes 0.55 ms in place of 0.69,
  # while it saves 0.71 in place of 0.88 (4 x 8192 tokens, 16 heads of 128, on an H200). Of a short
  # sequence the second would begin when the first has ended: two of half the width wait for each
  # other too (0.69 for 0.89 there, in place of one).
  pair = deep if rdn and tile == 64 and not is_short else None
  # A deeper pipeline pays unless its addresses cost registers that the delta rule needs.
  forward = loop if rdn else deep
  if rdn and is_alone and pair is None:
    forward = Kernel(32, 4, 3)
  parallel = Kernel(min(32, tile), 4, 3)
  return {
    'chunk': 32,
    'prepare': Kernel(0, 1, 1),
    'forward': forward,
    'sweep': dataclasses.replace(deep, stages=4) if is_alone and not rdn else deep,
    'queries': parallel,
    # As deep as leaves the shared memory for two programs.
    'keys': dataclasses.replace(
      parallel, stages={(True, False): 3, (False, True): 5}.get((delta, residual), 4)
    ),
    'bits_last': residual and forward.value == 64,
    'pair': pair,
  }


def _usual_heads_before_hopper(tile) -> dict:
  """The same before Hopper: products of 16 rows a warp in place of 64 for four.

  States of 64 columns would spill.
  """
  walk = Kernel(min(32, tile), 4, 3)
  parallel = Kernel(min(32, tile), 8, 2)
  return {
    'chunk': 32, 'prepare': Kernel(0, 1, 1), 'forward': walk, 'sweep': walk, 'queries': parallel,
    'keys': parallel,
  }  # fmt: skip


def _large_heads(tile, is_alone, delta, residual) -> dict:
  """What heads of over 128 keys take on a Hopper: with 8 warps registers hold 64 tokens of them."""
  # Three stages leave the shared memory for one program a multiprocessor.
  walk = Kernel(tile, tile // 16, 3 if is_alone else 2)
  # Narrower tiles have no wgmma, and by the compiler's report no registers for 32 tokens.
  chunk = 32 if tile == 64 else 16
  return {
    'chunk': chunk,
    'span': 64 // chunk,
    'prepare': Kernel(0, 2, 1),
    'forward': walk,
    'sweep': walk,
    'queries': Kernel(tile, 8, 2),
    'keys': Kernel(tile, 8, 3 if residual and not delta else 2),
    'fill': 2,  # more parts cost more than they gain: each has states of 256 x 256
  }


def _small_chunks(tile) -> dict:
  """What serves float32, and heads of over 128 keys before Hopper."""
  walk, parallel = Kernel(tile, tile // 16, 2), Kernel(16, 4, 2)
  return {
    'chunk': 16, 'prepare': Kernel(0, 4, 1), 'forward': walk, 'sweep': walk, 'queries': parallel,
    'keys': parallel,
  }  # fmt: skip


def table_path(device_kind: str) -> pathlib.Path:
  """File of the tuned table of a card, as JAX names it: 'NVIDIA H200' has tuned/h200.json."""
  name = device_kind.lower().replace('nvidia', '').strip().replace(' ', '_')
  return pathlib.Path(__file__).parent / 'tuned' / f'{name}.json'


@functools.cache
def tuned_table(device_kind: str) -> dict:
  """Records of `Blocks` by `tuned_key`, empty for a card that nobody has tuned."""
  path = table_path(device_kind)
  return json.loads(path.read_text()) if path.exists() else {}


def tuned_key(
  *, delta: bool, residual: bool, key_dim: int, value_dim: int, dtype, heads: int, length: int
) -> str:
  """Name of a call in the tuned tables; the length rounded down to a power of two.

  Not the heads: how they fill a card decides what is fast.
  """
  rule = ('delta' if delta else 'additive') + ('_residual' if residual else '')
  length = 1 << (length.bit_length() - 1)
  return f'{rule}/{jnp.dtype(dtype).name}/K{key_dim}/V{value_dim}/heads{heads}/length{length}'


def parsed_key(key: str) -> dict:
  """The call that a `tuned_key` names."""
  rule, dtype, *sizes = key.split('/')
  names = ('key_dim', 'value_dim', 'heads', 'length')
  numbers = (int(re.sub(r'\D', '', size)) for size in sizes)
  return {
    'delta': rule.startswith('delta'), 'residual': rule.endswith('residual'), 'dtype': dtype,
    **dict(zip(names, numbers, strict=True)),
  }  # fmt: skip


def choose(device_kind: str | None, *, hopper: bool = True, **call) -> Blocks:
  """The tuned block sizes of a call if the card's table has them, else the heuristic's."""
  record = tuned_table(device_kind).get(tuned_key(**call)) if device_kind else None
  return Blocks.from_json(record) if record else heuristic(**call, hopper=hopper)
