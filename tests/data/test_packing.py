"""Packing, by properties: with tokens that are their own positions, every row can be read back."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rla_jax.data.packing import pack
from tests.data.texts import numbered

# A document is bos, any number of tokens, eos.
LENGTHS = st.lists(st.integers(2, 70), min_size=1, max_size=40)
SEQ_LEN = st.integers(1, 33)


def all_rows(packing):
  return packing.rows(np.arange(packing.num_rows))


@settings(deadline=None, max_examples=300)
@given(LENGTHS, SEQ_LEN, st.integers(0, 9))
def test_every_target_once_and_none_across_documents(lengths, seq_len, seed):
  documents = numbered(lengths)
  batch = all_rows(pack(documents, seq_len, seed))
  counted = batch['loss_mask'] > 0
  tokens, targets = batch['tokens'][counted], batch['targets'][counted]
  np.testing.assert_array_equal(targets, tokens + 1)
  # Everything but bos is a target; everything but eos is an input. So none crosses a document.
  everything = np.arange(sum(lengths))
  ends = np.cumsum(lengths)
  np.testing.assert_array_equal(np.sort(targets), np.delete(everything, documents.starts))
  np.testing.assert_array_equal(np.sort(tokens), np.delete(everything, ends - 1))


@settings(deadline=None, max_examples=300)
@given(LENGTHS, SEQ_LEN, st.integers(0, 9))
def test_a_segment_is_a_run_of_one_document(lengths, seq_len, seed):
  document_of = np.repeat(np.arange(len(lengths)), lengths)
  batch = all_rows(pack(numbered(lengths), seq_len, seed))
  for tokens, segments, mask in zip(
    batch['tokens'], batch['segment_ids'], batch['loss_mask'], strict=True
  ):
    used = int((segments > 0).sum())
    assert used > 0
    assert (segments[used:] == 0).all()
    np.testing.assert_array_equal(mask, segments > 0)
    assert segments[0] == 1
    step = np.diff(segments[:used])
    assert np.isin(step, (0, 1)).all()
    # Inside a segment positions rise by one; where it changes they do not go on.
    np.testing.assert_array_equal(np.diff(tokens[:used])[step == 0], 1)
    for segment in range(1, segments.max() + 1):
      assert len(set(document_of[tokens[segments == segment]])) == 1


@settings(deadline=None)
@given(LENGTHS, SEQ_LEN, st.integers(0, 9))
def test_little_is_wasted(lengths, seq_len, seed):
  documents = numbered(lengths)
  packing = pack(documents, seq_len, seed)
  fill = np.sort((all_rows(packing)['segment_ids'] > 0).sum(axis=1))
  # Best fit never leaves two rows that would go into one.
  assert packing.num_rows == 1 or fill[0] + fill[1] > seq_len
  # A document is cut only where a row ends: no more pieces than necessary.
  inputs = np.array(lengths) - 1
  assert packing.starts.size == (-(-inputs // seq_len)).sum()


def test_long_rests_are_placed_first():
  # Placed in any other order, two rests of 4 can share a row, which leaves one of 6 alone.
  documents = numbered([5, 5, 7, 7] * 5)
  assert {pack(documents, 10, seed).num_rows for seed in range(10)} == {10}


def test_seed_decides_who_shares_a_row():
  documents = numbered([6] * 40)
  one, again, other = (all_rows(pack(documents, 12, seed))['tokens'] for seed in (0, 0, 1))
  np.testing.assert_array_equal(one, again)
  assert not np.array_equal(one, other)


def test_padding_rows():
  packing = pack(numbered([5, 9]), 4, seed=0)
  batch = packing.rows(np.array([-1, 0, -1]))
  for name, array in batch.items():
    assert array.shape == (3, 4), name
    assert array.dtype == (np.float32 if name == 'loss_mask' else np.int32), name
    assert not array[[0, 2]].any()
  np.testing.assert_array_equal(batch['tokens'][1], packing.rows(np.array([0]))['tokens'][0])


def test_example():
  # Documents [0 .. 6] and [7 .. 9]: one full row, then the rest of the first with the second.
  batch = all_rows(pack(numbered([7, 3]), 4, seed=0))
  np.testing.assert_array_equal(batch['tokens'][0], [0, 1, 2, 3])
  assert sorted(batch['tokens'][1].tolist()) == [4, 5, 7, 8]
  assert sorted(batch['targets'][1].tolist()) == [5, 6, 8, 9]
  np.testing.assert_array_equal(batch['segment_ids'], [[1, 1, 1, 1], [1, 1, 2, 2]])
