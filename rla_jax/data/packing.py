"""Documents to rows of fixed length, several short documents to a row, none ever mixed.

Grain's own packing transformations are sequential; a plan made in advance gives every row by its
number, so that a run resumes from its step alone.
"""

import bisect
import dataclasses
from typing import TypedDict

import numpy as np
from jaxtyping import Float32, Int, Int32, UInt

from rla_jax.data.corpus import TokenSet

PACKING_VERSION = 1


class Batch(TypedDict):
  """Rows of one step; in training and evaluation those of this process."""

  tokens: Int32[np.ndarray, 'B T']  # the inputs
  targets: Int32[np.ndarray, 'B T']  # the next token of the same document, eos_id at its end
  segment_ids: Int32[np.ndarray, 'B T']  # 1, 2, ... along a row; 0 is padding
  loss_mask: Float32[np.ndarray, 'B T']  # 1 where a target counts, 0 on padding


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Packing:
  """Which pieces of which documents stand in which row.

  Attributes:
    tokens: uint16 or uint32 [M], the flat corpus.
    starts: int64 [P], where a piece begins in `tokens`.
    lengths: int64 [P], its tokens; 1 to seq_len.
    row_offsets: int64 [R + 1]; row r holds the pieces row_offsets[r] to row_offsets[r + 1].
    seq_len: T.
  """

  tokens: UInt[np.ndarray, 'M']
  starts: Int[np.ndarray, 'P']
  lengths: Int[np.ndarray, 'P']
  row_offsets: Int[np.ndarray, 'R1']
  seq_len: int

  @property
  def num_rows(self) -> int:
    """R."""
    return self.row_offsets.size - 1

  def rows(self, index: Int[np.ndarray, 'B']) -> Batch:
    """Assembles a batch.

    Args:
      index: int [B], row numbers; -1 is a row of padding.

    Returns:
      The rows.
    """
    shape = len(index), self.seq_len
    tokens_BT, targets_BT, segment_ids_BT = (np.zeros(shape, np.int32) for _ in range(3))
    for row, number in enumerate(index):
      if number < 0:
        continue
      column = 0
      pieces = range(self.row_offsets[number], self.row_offsets[number + 1])
      for segment, piece in enumerate(pieces, start=1):
        begin, length = self.starts[piece], self.lengths[piece]
        end = column + length
        tokens_BT[row, column:end] = self.tokens[begin : begin + length]
        targets_BT[row, column:end] = self.tokens[begin + 1 : begin + length + 1]
        segment_ids_BT[row, column:end] = segment
        column = end
    return {
      'tokens': tokens_BT,
      'targets': targets_BT,
      'segment_ids': segment_ids_BT,
      'loss_mask': (segment_ids_BT > 0).astype(np.float32),
    }


def pack(documents: TokenSet, seq_len: int, seed: int) -> Packing:
  """Plans the rows: best fit, longest first.

  A document of n + 1 tokens (bos to eos) has n inputs, all but eos, each with the token after it
  as target. It fills rows of its own as long as seq_len inputs are left; the rest goes whole into
  the fullest row that has room. A later piece of a document starts from nothing, as a segment of
  its own, and each target occurs exactly once in all rows.

  Args:
    documents: what to pack.
    seq_len: T.
    seed: decides which of several equally long rests comes first.

  Returns:
    The plan, a function of the arguments alone.
  """
  inputs = documents.lengths - 1
  full, rest = np.divmod(inputs, seq_len)
  full_document = np.repeat(np.arange(inputs.size), full)
  full_number = np.arange(full_document.size) - np.repeat(np.cumsum(full) - full, full)
  full_starts = documents.starts[full_document] + full_number * seq_len

  order = np.random.default_rng(seed).permutation(np.flatnonzero(rest))
  order = order[np.argsort(-rest[order], kind='stable')]
  row_of = _best_fit(rest[order].tolist(), seq_len)
  order, row_of = order[np.argsort(row_of, kind='stable')], np.sort(row_of)
  pieces_per_row = np.concatenate((np.ones_like(full_starts), np.bincount(row_of)))
  return Packing(
    tokens=documents.tokens,
    starts=np.concatenate((full_starts, (documents.starts + full * seq_len)[order])),
    lengths=np.concatenate((np.full_like(full_starts, seq_len), rest[order])),
    row_offsets=np.concatenate(([0], np.cumsum(pieces_per_row))),
    seq_len=seq_len,
  )


def _best_fit(lengths: list[int], capacity: int) -> np.ndarray:
  """Row numbers int64 [P] of lengths in falling order, each put where it leaves least room."""
  row_of = np.zeros(len(lengths), np.int64)
  rooms: list[int] = []  # The sizes of room that some row has left, rising.
  rows_with: dict[int, list[int]] = {}
  num_rows = 0
  for piece, length in enumerate(lengths):
    slot = bisect.bisect_left(rooms, length)
    if slot == len(rooms):
      row, room = num_rows, capacity
      num_rows += 1
    else:
      room = rooms[slot]
      row = rows_with[room].pop()
      if not rows_with[room]:
        del rows_with[room], rooms[slot]
    row_of[piece] = row
    room -= length
    if room:
      if room not in rows_with:
        rows_with[room] = []
        bisect.insort(rooms, room)
      rows_with[room].append(row)
  return row_of
