import numpy as np
import pytest

from rla_jax import data
from rla_jax.data import DataConfig, DataError, synthetic
from rla_jax.data.synthetic import tasks
from rla_jax.data.synthetic.examples import Examples


@pytest.fixture
def config(monkeypatch):
  """Two small training sets, of lengths 16 and 32, and two test sets."""

  def sets(seed, reassigned, sizes):
    return [synthetic.multi_query_recall(seed, *size, reassigned=reassigned) for size in sizes]

  monkeypatch.setattr(
    tasks, 'based_train', lambda s, r: sets(s, r, [(16, 2, 10), (32, 4, 5), (64, 4, 5)])
  )
  monkeypatch.setattr(tasks, 'based_test', lambda s, r: sets(s + 1, r, [(16, 2, 5), (64, 8, 3)]))
  return DataConfig(path='mqar', format='synthetic', seq_len=32, batch_size=4)


def rows(batch):
  """Tokens of a batch's rows without padding, as bytes."""
  return [
    t[s > 0].tobytes() for t, s in zip(batch['tokens'], batch['segment_ids'], strict=True) if s[0]
  ]


def test_an_epoch_has_every_example_once_and_a_batch_one_length(config):
  corpus = data.load(config)
  assert data.steps_per_epoch(config, corpus) == 5
  batches = data.train_batches(config, corpus)
  for _ in range(2):
    epoch = [next(batches) for _ in range(5)]
    want = [row.tobytes() for s in corpus.train.sets for row in s.tokens]
    assert sorted(r for batch in epoch for r in rows(batch)) == sorted(want)
    for batch in epoch:
      assert batch['tokens'].shape == (4, 32)
      assert len({len(row) for row in rows(batch)}) == 1
      assert (batch['segment_ids'][batch['loss_mask'] > 0] == 1).all()


def test_resumes_at_any_step_and_splits_over_processes(config):
  corpus = data.load(config)
  whole = data.train_batches(config, corpus)
  steps = [next(whole) for _ in range(8)]
  later = next(data.train_batches(config, corpus, start_step=7))
  parts = [
    next(data.train_batches(config, corpus, start_step=7, process_index=p, process_count=2))
    for p in range(2)
  ]
  for name, x in steps[7].items():
    assert (later[name] == x).all()
    assert (np.concatenate([part[name] for part in parts]) == x).all()


def test_evaluation_has_every_target_once_in_its_own_length(config):
  corpus = data.load(config)
  batches = data.evaluation_batches(config, corpus, batch_size=2)
  assert (batches.num_documents, batches.num_tokens, batches.num_bytes) == (8, 5 * 2 + 3 * 8, 0)
  for _ in range(2):
    found = list(batches)
    assert len(found) == len(batches) == 5
    assert {batch['tokens'].shape for batch in found} == {(2, 16), (2, 64)}
    assert sum(batch['loss_mask'].sum() for batch in found) == batches.num_tokens
  few = data.evaluation_batches(config, corpus, max_tokens=10)
  assert few.num_documents == 2
  assert sum(batch['loss_mask'].sum() for batch in few) == few.num_tokens == 10


def test_fingerprints_tell_tasks_and_seeds_apart(config):
  def of(**changes):
    changed = DataConfig(**{
      'path': 'mqar', 'format': 'synthetic', 'seq_len': 32, 'batch_size': 4, **changes
    })  # fmt: skip
    return data.fingerprint(changed, data.load(changed))

  assert of() == of()
  for change in ({'seed': 1}, {'path': 'mqar_reassigned'}, {'batch_size': 2}):
    with pytest.raises(DataError, match='the data are not those of the checkpoint'):
      data.check_fingerprint(of(), of(**change))


@pytest.mark.parametrize(
  ('task', 'vocabulary'), [('parity', 2), ('modular_arithmetic', 15), ('permutations', 120)]
)
def test_state_tracking_tests_at_longer_lengths(monkeypatch, task, vocabulary):
  monkeypatch.setattr(tasks, 'STATE_TRACKING_TRAIN', 6)
  monkeypatch.setattr(tasks, 'STATE_TRACKING_TEST', 3)
  config = DataConfig(path=task, format='synthetic', seq_len=8, batch_size=2)
  corpus = data.load(config)
  assert data.tokenizer_of(config).vocab_size == corpus.tokenizer.vocab_size == vocabulary
  assert [s.tokens.shape for s in corpus.validation.sets] == [(3, 8), (3, 16), (3, 32)]
  assert isinstance(corpus.train.sets[0], Examples)


def test_unknown_tasks_and_short_sequences_are_one_line(config):
  with pytest.raises(DataError, match=r"unknown synthetic task 'mqr'.*tasks: mqar, mqar_"):
    data.load(DataConfig(path='mqr', format='synthetic'))
  with pytest.raises(DataError, match='no examples of at most 8 tokens'):
    data.load(DataConfig(path='mqar', format='synthetic', seq_len=8))
