"""The held-out split: a function of content and seed, no text on both sides, no side empty."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rla_jax.data import DataError, Document
from rla_jax.data.split import cut_lone_document, digest, ranks, split
from tests.data.texts import documents


def digests(texts) -> np.ndarray:
  return np.frombuffer(b''.join(digest(t) for t in texts), np.uint8).reshape(-1, 16)


def numbers(count: int) -> list[bytes]:
  return [str(n).encode() for n in range(count)]


def test_fraction():
  for fraction in (0.01, 0.1, 0.5):
    held_out = split(digests(numbers(20_000)), fraction, seed=3).mean()
    assert abs(held_out - fraction) < 4 * np.sqrt(fraction / 20_000)


def test_other_documents_do_not_move_a_document():
  whole = split(digests(numbers(1000)), 0.1, seed=0)
  rng = np.random.default_rng(0)
  for _ in range(10):
    part = rng.permutation(1000)[:500]
    held_out = split(digests(numbers(1000))[part], 0.1, seed=0)
    np.testing.assert_array_equal(held_out, whole[part])


def test_seeds_are_independent():
  one, other = (split(digests(numbers(20_000)), 0.2, seed) for seed in (0, 1))
  assert abs((one & other).mean() - 0.04) < 0.006


def test_copies_fall_on_one_side():
  texts = numbers(100)
  held_out = split(digests(texts * 3), 0.3, seed=0).reshape(3, 100)
  assert (held_out == held_out[0]).all()
  assert 0 < held_out[0].sum() < 100


@given(st.integers(2, 6), st.sampled_from([1e-9, 0.5, 1 - 1e-9]), st.integers(0, 99))
def test_neither_side_is_empty(count, fraction, seed):
  held_out = split(digests(numbers(count)), fraction, seed)
  assert 0 < held_out.sum() < count


def test_copies_of_one_text_cannot_be_split():
  with pytest.raises(DataError, match='copies of one text'):
    split(digests([b'a'] * 3), 0.5, seed=0)


def test_ranks_are_fixed():
  # The held-out set of published figures must not move.
  rank_N = ranks(digests([b'a', b'b']), seed=0)
  assert rank_N.tolist() == [8702738328953547100, 17714908208944719078]


@given(st.text(min_size=2, max_size=50), st.floats(0.01, 0.99))
def test_lone_document_is_cut_between_characters(text, fraction):
  lone = documents([text])
  if int(len(lone[0].text) * (1 - fraction)) < 4:
    return
  kept, held_out = cut_lone_document(lone, fraction)
  assert kept.text + held_out.text == text.encode()
  assert kept.text.decode()
  assert held_out.text.decode()
  assert len(held_out.text) >= fraction * len(lone[0].text) - 1


def test_lone_document_is_cut_at_a_line_break():
  lines = b''.join(b'line %03d\n' % n for n in range(100))
  kept, held_out = cut_lone_document([Document(lines, 'a.txt')], 0.1)
  assert kept.text.endswith(b'\n')
  assert held_out.text.startswith(b'line 0')
  assert len(held_out.text) == 90
  assert kept.source == 'a.txt'


def test_more_documents_pass_unchanged():
  several = documents(numbers(5))
  assert list(cut_lone_document(several, 0.5)) == several
  assert list(cut_lone_document([], 0.5)) == []


def test_document_too_short_to_be_cut():
  with pytest.raises(DataError, match=r'x\.txt is the only document and too short'):
    list(cut_lone_document([Document(b'a', 'x.txt')], 0.5))
