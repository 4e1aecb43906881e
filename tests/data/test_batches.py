"""The order of training and the completeness of evaluation, whatever the number of processes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rla_jax.data import (
  Corpus,
  DataConfig,
  evaluation_batches,
  load_tokenizer,
  steps_per_epoch,
  train_batches,
)
from rla_jax.data.packing import pack
from tests.data.texts import corpus_folder, numbered

NAMES = ('tokens', 'targets', 'segment_ids', 'loss_mask')


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  return str(corpus_folder(tmp_path_factory.mktemp('corpus')))


@pytest.fixture(scope='module')
def config(path):
  return DataConfig(path=path, seq_len=32, batch_size=8, validation_fraction=0.3)


@pytest.fixture(scope='module')
def corpus(config):
  return Corpus.load(config)


def made_of(train=(2,), validation=(2,)) -> Corpus:
  byte = load_tokenizer('byte')
  return Corpus(numbered(train), numbered(validation), byte, files=(), sha256='')


def take(batches, count: int) -> list[dict]:
  return list(itertools.islice(batches, count))


def assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert tuple(a) == tuple(b) == NAMES
    for name in NAMES:
      np.testing.assert_array_equal(a[name], b[name])
      assert a[name].dtype == b[name].dtype


def joined(parts: list[list[dict]]) -> list[dict]:
  """Global batches from those of every process, as jax.make_array_from_process_local_data does."""
  return [
    {name: np.concatenate([batch[name] for batch in step]) for name in NAMES}
    for step in zip(*parts, strict=True)
  ]


def test_shapes(config, corpus):
  (batch,) = take(train_batches(config, corpus), 1)
  for name in NAMES:
    assert batch[name].shape == (8, 32)
    assert batch[name].dtype == (np.float32 if name == 'loss_mask' else np.int32)


@pytest.mark.parametrize('count', [2, 4, 8])
@pytest.mark.parametrize('start', [0, 7])
def test_order_does_not_depend_on_the_number_of_processes(config, corpus, count, start):
  alone = take(train_batches(config, corpus, start_step=start), 9)
  parts = [
    take(train_batches(config, corpus, start_step=start, process_index=p, process_count=count), 9)
    for p in range(count)
  ]
  assert_same(joined(parts), alone)


@pytest.mark.parametrize('step', [1, 3, 20, 57])
def test_start_is_as_if_all_before_had_been_skipped(config, corpus, step):
  skipped = take(train_batches(config, corpus), step + 4)[step:]
  assert_same(take(train_batches(config, corpus, start_step=step), 4), skipped)


def test_far_step_costs_nothing(config, corpus):
  assert len(take(train_batches(config, corpus, start_step=10**12), 1)) == 1


def test_threads_do_not_change_the_order(path, config, corpus):
  other = DataConfig(
    path=path, seq_len=32, batch_size=8, validation_fraction=0.3, num_threads=7, prefetch_batches=1
  )
  assert_same(
    take(train_batches(other, corpus), 40), take(train_batches(config, corpus), 40)
  )


def test_grain_state_is_the_step(config, corpus):
  batches = train_batches(config, corpus, start_step=5)
  take(batches, 3)
  state = batches.get_state()
  following = take(batches, 2)
  again = train_batches(config, corpus, start_step=5)
  again.set_state(state)
  assert_same(take(again, 2), following)
  assert_same(take(train_batches(config, corpus, start_step=8), 2), following)


@settings(deadline=None, max_examples=20)
@given(
  lengths=st.lists(st.integers(2, 30), min_size=1, max_size=20),
  seq_len=st.integers(1, 9),
  batch_size=st.integers(1, 5),
)
def test_epochs_hold_every_target_once_and_differ(lengths, seq_len, batch_size):
  config = DataConfig(seq_len=seq_len, batch_size=batch_size)
  corpus = made_of(train=lengths)
  rows = pack(corpus.train, seq_len, config.seed).num_rows
  assert steps_per_epoch(config, corpus) * batch_size == rows
  # So many steps are exactly batch_size epochs.
  batches = take(train_batches(config, corpus), rows)
  targets, mask = (np.concatenate([b[name] for b in batches]) for name in ('targets', 'loss_mask'))
  expected = np.delete(np.arange(sum(lengths)), corpus.train.starts)
  epochs = []
  for e in range(batch_size):
    epoch = slice(e * rows, (e + 1) * rows)
    np.testing.assert_array_equal(np.sort(targets[epoch][mask[epoch] > 0]), expected)
    epochs.append(targets[epoch].tobytes())
  if rows > 20:  # Two orders of 20 rows agree once in 20! times.
    assert len(set(epochs)) == batch_size


def test_seeds_do_not_share_epochs(corpus):
  rows = [
    [batch['tokens'].tobytes() for batch in take(train_batches(config, corpus), 60)]
    for config in (DataConfig(seq_len=32, batch_size=1, seed=seed) for seed in (0, 1))
  ]
  assert not any(rows[0][n : n + 8] == rows[1][:8] for n in range(52))
  assert not any(rows[1][n : n + 8] == rows[0][:8] for n in range(52))


@settings(deadline=None, max_examples=40)
@given(
  lengths=st.lists(st.integers(2, 30), min_size=1, max_size=20),
  seq_len=st.integers(1, 9),
  local=st.integers(1, 4),
  count=st.integers(1, 3),
)
def test_evaluation_holds_every_target_once(lengths, seq_len, local, count):
  config = DataConfig(seq_len=seq_len, batch_size=3)
  corpus = made_of(validation=lengths)
  parts = [
    evaluation_batches(
      config, corpus, batch_size=local * count, process_index=p, process_count=count
    )
    for p in range(count)
  ]
  # Every process makes the same number of steps of the same shape.
  assert len({len(part) for part in parts}) == 1
  batches = [batch for part in parts for batch in part]
  assert {batch['tokens'].shape for batch in batches} == {(local, seq_len)}
  mask = np.concatenate([b['loss_mask'] for b in batches]) > 0
  targets = np.concatenate([b['targets'] for b in batches])[mask]
  expected = np.delete(np.arange(sum(lengths)), corpus.validation.starts)
  np.testing.assert_array_equal(np.sort(targets), expected)
  assert parts[0].num_tokens == targets.size
  assert parts[0].num_bytes == sum(lengths) - 2 * len(lengths)
  assert parts[0].num_documents == len(lengths)


def test_evaluation_may_be_repeated(config, corpus):
  held_out = evaluation_batches(config, corpus)
  first = list(held_out)
  assert len(first) == len(held_out)
  assert_same(first, list(held_out))


def test_bits_per_byte_of_a_uniform_model(config, corpus):
  held_out = evaluation_batches(config, corpus)
  nats = sum(batch['loss_mask'].sum() for batch in held_out) * math.log(258)
  documents = corpus.validation
  bits_per_byte = nats / (math.log(2) * held_out.num_bytes)
  expected = math.log2(258) * (1 + documents.num_documents / documents.num_bytes)
  assert bits_per_byte == pytest.approx(expected, rel=1e-6)


def test_short_evaluation_is_of_whole_documents():
  config = DataConfig(seq_len=4, batch_size=2)
  corpus = made_of(validation=[11, 6, 21])  # 10, 5 and 20 targets, 9, 4 and 19 bytes.
  expected = {1: (1, 10, 9), 14: (1, 10, 9), 15: (2, 15, 13), 35: (3, 35, 32), 99: (3, 35, 32)}
  for max_tokens, (documents, tokens, size) in expected.items():
    held_out = evaluation_batches(config, corpus, max_tokens=max_tokens)
    assert (held_out.num_documents, held_out.num_tokens, held_out.num_bytes) == (
      documents, tokens, size
    )
    assert sum(batch['loss_mask'].sum() for batch in held_out) == tokens


def test_wrong_arguments(config, corpus):
  with pytest.raises(ValueError, match='batch_size is 8, which process_count 3 does not divide'):
    train_batches(config, corpus, process_count=3)
  with pytest.raises(ValueError, match='process_index is 2 of process_count 2'):
    evaluation_batches(config, corpus, process_index=2, process_count=2)
  with pytest.raises(ValueError, match='start_step is -1'):
    train_batches(config, corpus, start_step=-1)
  with pytest.raises(ValueError, match='max_tokens is 0'):
    evaluation_batches(config, corpus, max_tokens=0)
  with pytest.raises(ValueError, match='batch_size is 0'):
    evaluation_batches(config, corpus, batch_size=0)


def test_order_is_pinned():
  # A checkpoint of an older version resumes only while this holds; else raise PACKING_VERSION.
  corpus = made_of(train=[3, 9, 4, 12, 7, 5, 30, 2, 8])
  batches = train_batches(DataConfig(seq_len=8, batch_size=2), corpus, start_step=3)
  (batch,) = take(batches, 1)
  assert batch['tokens'].tolist() == [
    [16, 17, 18, 19, 20, 21, 22, 23],
    [3, 4, 5, 6, 7, 8, 9, 10],
  ]
