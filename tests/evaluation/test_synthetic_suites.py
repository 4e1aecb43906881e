"""Suites for checkpoints of synthetic tasks: what is counted, and who is skipped."""

import json

import numpy as np
import pytest

from rla_jax.data.synthetic import corpus as corpora
from rla_jax.data.synthetic import multi_query_recall, parity
from rla_jax.evaluation import run_suites, suites, synthetic, throughput
from rla_jax.evaluation.run import Settings
from rla_jax.models import ModelConfig
from rla_jax.training import get_config
from rla_jax.training.trained import TrainedModel
from tests.evaluation import models


def trained_on(monkeypatch, task, vocabulary, **settings):
  """A random model that is said to be trained on a task."""
  config = get_config()
  config.data.format, config.data.path, config.data.seq_len = 'synthetic', task, 16
  config.update_from_flattened_dict(settings)
  model, params = models.small(vocab_size=vocabulary)
  trained = TrainedModel(config, model, params, corpora.IdTokenizer(vocabulary), step=5)
  monkeypatch.setattr(suites, 'load', lambda workdir, mesh: trained)
  return trained


def test_accuracy_counts_targets_only_whatever_the_batch(monkeypatch):
  trained = trained_on(monkeypatch, 'mqar', 32)
  examples = multi_query_recall(0, 16, 2, 7, vocab_size=32)
  found = synthetic.correct(trained.model, trained.params, examples, 48)
  again = synthetic.correct(trained.model, trained.params, examples, 1000)
  np.testing.assert_array_equal(found, again)
  logits = trained.model.apply({'params': trained.params}, examples.tokens)
  np.testing.assert_array_equal(found, np.asarray(logits).argmax(-1) == examples.targets)


def test_state_tracking_by_length_and_position(monkeypatch, tmp_path):
  monkeypatch.setattr(corpora, 'STATE_TRACKING_TRAIN', 4)
  monkeypatch.setattr(corpora, 'STATE_TRACKING_TEST', 40)
  trained_on(monkeypatch, 'parity', 2)

  def always_right(model, params, examples, batch_tokens):
    return np.arange(examples.tokens.shape[1])[None].repeat(len(examples), 0) < 16

  monkeypatch.setattr(synthetic, 'correct', always_right)
  found, skipped = run_suites('w', ['state_tracking', 'mqar'], tmp_path, Settings(limit=20))
  assert [(r.metric, r.value, r.samples) for r in found] == [
    ('accuracy', pytest.approx((1 + 1 / 2 + 1 / 4) / 3), 60), ('accuracy_parity_L16', 1.0, 20),
    ('accuracy_parity_L32', 0.5, 20), ('accuracy_parity_L64', 0.25, 20),
  ]  # fmt: skip
  assert set(skipped) == {'modular_arithmetic', 'permutations', 'mqar', 'mqar_reassigned'}
  assert skipped['mqar'] == 'the checkpoint was trained on parity'
  assert (tmp_path / 'parity.png').stat().st_size > 1000
  last = (tmp_path / 'parity.csv').read_text().splitlines()[-1].split(',')
  assert last[0] == 'parity L64' and float(last[-1]) == 0.0


def test_mean_over_recall_sets_stands_beside_the_published_one(monkeypatch, tmp_path):
  sets = [multi_query_recall(s, 16, pairs, 5, vocab_size=32) for s, pairs in ((0, 1), (1, 4))]
  monkeypatch.setattr(corpora, 'based_train', lambda s, r: sets)
  monkeypatch.setattr(corpora, 'based_test', lambda s, r: sets)
  trained_on(monkeypatch, 'mqar', 32)
  monkeypatch.setattr(
    synthetic, 'correct', lambda m, p, e, b: np.full(e.tokens.shape, e.name == 'L16 N4')
  )
  found, _ = run_suites('w', ['mqar'], tmp_path)
  assert found[0].value == 0.5  # of the sets, not of the targets
  assert 'Gated DeltaNet, d = 64' in (tmp_path / 'results.md').read_text()
  assert json.loads((tmp_path / 'results.json').read_text())['step'] == 5


def test_parity_by_hand():
  examples = parity(0, 9, 4)
  assert (np.bitwise_xor.accumulate(examples.tokens, axis=1) == examples.targets).all()


def test_throughput_of_a_mixer(monkeypatch, tmp_path):
  trained_on(monkeypatch, 'parity', 32, **{'optimizer.warmup_steps': 0})
  monkeypatch.setattr(throughput, 'REPETITIONS', 1)
  monkeypatch.setattr(throughput, 'DECODED', 32)
  settings = Settings(lengths=(8,), mixers=('attention',), batch_tokens=16, chunk=8)
  found, _ = run_suites('w', ['throughput'], tmp_path, settings)
  assert len(found) == 3 and all(r.value > 0 for r in found)
  rows = (tmp_path / 'throughput.csv').read_text().splitlines()
  assert [row.split(',')[:4] for row in rows[1:]] == [
    [kind, 'attention', '8', '2'] for kind in ('train', 'prefill', 'decode')
  ]
  assert all(int(row.split(',')[6]) > 0 for row in rows[1:])
  assert (tmp_path / 'throughput_train.png').stat().st_size > 1000


def test_throughput_names_what_does_not_fit():
  import jax

  def too_large(count, length):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')

  assert throughput._attempt(too_large, 1, 8) is None
  with pytest.raises(jax.errors.JaxRuntimeError):
    throughput._attempt(lambda c, n: (_ for _ in ()).throw(jax.errors.JaxRuntimeError('no')), 1, 8)


def test_another_mixer_in_the_same_model():
  config = ModelConfig(vocab_size=9, pattern=('rdn',), layer_options={'rdn': {'clip': None}})
  other = throughput.with_mixer(config, 'attention')
  assert other.pattern == ('attention',) and not other.layer_options
  assert other.model_dim == config.model_dim
  assert throughput.with_mixer(config, 'rdn') == config
  with pytest.raises(ValueError, match="no 'rdm'; did you mean 'rdn'"):
    throughput.with_mixer(config, 'rdm')
