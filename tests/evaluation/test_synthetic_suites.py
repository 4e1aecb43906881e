"""Suites for checkpoints of synthetic tasks: what is counted, and who is skipped."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import generation
from rla_jax.data import DataError
from rla_jax.data.synthetic import multi_query_recall, tasks
from rla_jax.evaluation import run_suites, suites, synthetic, throughput
from rla_jax.evaluation.results import read_rows
from rla_jax.evaluation.run import Settings
from rla_jax.models import LanguageModel, ModelConfig
from rla_jax.training import get_config
from rla_jax.training.trained import TrainedModel
from tests.evaluation import models


def trained_on(monkeypatch, task, vocabulary, **settings):
  """A random model that is said to be trained on a task."""
  config = get_config()
  config.data.format, config.data.path, config.data.seq_len = 'synthetic', task, 16
  config.update_from_flattened_dict(settings)
  model, params = models.small(vocab_size=vocabulary)
  trained = TrainedModel(config, model, params, tasks.IdTokenizer(vocabulary), step=5)
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
  monkeypatch.setattr(tasks, 'STATE_TRACKING_TRAIN', 4)
  monkeypatch.setattr(tasks, 'STATE_TRACKING_TEST', 40)
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


def test_a_model_of_ids_has_no_text(monkeypatch, tmp_path):
  trained_on(monkeypatch, 'parity', 2)
  with pytest.raises(DataError, match='text: the checkpoint was trained on parity'):
    run_suites('w', ['text'], tmp_path)
  tokenizer = tasks.IdTokenizer(2)
  assert tokenizer.encode('1 0').tolist() == [1, 0]
  for text in ('x', '2', '-1'):
    with pytest.raises(DataError, match=f"text '{text}'; the model knows ids alone"):
      tokenizer.encode(text)


def test_mean_over_recall_sets_stands_beside_the_published_one(monkeypatch, tmp_path):
  sets = [multi_query_recall(s, 16, pairs, 5, vocab_size=32) for s, pairs in ((0, 1), (1, 4))]
  monkeypatch.setattr(tasks, 'based_train', lambda s, r: sets)
  monkeypatch.setattr(tasks, 'based_test', lambda s, r: sets)
  trained_on(monkeypatch, 'mqar', 32)
  monkeypatch.setattr(
    synthetic, 'correct', lambda m, p, e, b: np.full(e.tokens.shape, e.name == 'L16 N4')
  )
  found, _ = run_suites('w', ['mqar'], tmp_path)
  assert found[0].value == 0.5  # of the sets, not of the targets
  assert 'Gated DeltaNet, d = 64' in (tmp_path / 'results.md').read_text()
  assert json.loads((tmp_path / 'results.json').read_text())['step'] == 5


def test_throughput_of_a_mixer(monkeypatch, tmp_path):
  trained_on(monkeypatch, 'parity', 32, **{'optimizer.warmup_steps': 0})
  monkeypatch.setattr(throughput, 'REPETITIONS', 1)
  monkeypatch.setattr(throughput, 'DECODED', 32)
  settings = Settings(lengths=(8,), mixers=('attention',), batch_tokens=16, chunk=8)
  found, _ = run_suites('w', ['throughput'], tmp_path, settings)
  assert len(found) == 3 and all(r.value > 0 for r in found)
  rows = read_rows(tmp_path / 'throughput.csv')
  assert [(r['kind'], r['mixer'], r['length'], r['sequences']) for r in rows] == [
    (kind, 'attention', 8, 2) for kind in ('train', 'prefill', 'decode')
  ]
  assert all(r['memory_bytes'] > 0 for r in rows)
  for kind in ('train', 'prefill', 'decode'):
    assert (tmp_path / f'throughput_{kind}.png').stat().st_size > 1000
    assert (tmp_path / f'memory_{kind}.png').stat().st_size > 1000


def test_a_prompt_is_read_at_once_where_attention_is_fused(monkeypatch):
  own = ModelConfig(
    vocab_size=9, num_layers=1, model_dim=8, num_heads=1, head_dim=8, pattern=('attention',)
  )
  options = {'attention': {'implementation': 'xla'}}
  monkeypatch.setattr(
    throughput, 'with_fused_attention', lambda c: dataclasses.replace(c, layer_options=options)
  )
  monkeypatch.setattr(throughput, 'REPETITIONS', 1)
  timing = throughput.prepare_prefill(LanguageModel(own), 2, 8, 8)()
  assert timing.seconds > 0 and timing.rate == pytest.approx(16 / timing.seconds)


def test_throughput_measures_what_is_missing_until_the_budget_is_spent(monkeypatch, tmp_path):
  model = ModelConfig(vocab_size=9, num_layers=1, model_dim=8, num_heads=1, head_dim=8)
  asked = []

  def prepare(model, count, length, chunk):
    asked.append((count, length))
    if length == 32:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')
    return lambda: throughput.Timing(0.5, 16, 100)

  monkeypatch.setattr(throughput, 'prepare_prefill', prepare)
  measure = functools.partial(
    throughput.measure, model, get_config(), tmp_path, batch_tokens=32, kinds=['prefill']
  )
  rows = measure(lengths=[8, 32])
  assert sorted(asked) == [(1, 32), (1, 32), (4, 8)]  # the second time alone
  assert [r['tokens_per_second'] for r in rows] == [32.0, None]
  known = read_rows(tmp_path / 'throughput.csv')
  assert known == rows
  (tmp_path / 'throughput_prefill.png').unlink()
  throughput.draw(tmp_path, ['prefill', 'decode'], known)
  assert (tmp_path / 'throughput_prefill.png').exists()
  assert len(measure(lengths=[8, 16, 32], known=known)) == 3
  assert asked[3:] == [(2, 16)]
  assert len(measure(lengths=[8, 64], known=known, mixers=['gdn'], budget=-1.0)) == 2
  assert len(asked) == 4
  with pytest.raises(DataError, match="kind 'decod'; expected some of train, prefill, decode"):
    measure(kinds=['decod'])


def test_throughput_measures_what_was_compiled_beyond_the_budget(monkeypatch, tmp_path):
  """Or a budget shorter than the compilation would never measure anything."""
  now = [0.0]

  def prepare(model, count, length, *_):
    now[0] += 10
    return lambda: throughput.Timing(0.5, count * length, 100)

  monkeypatch.setattr(throughput.time, 'perf_counter', lambda: now[0])
  monkeypatch.setattr(throughput, '_prepare', prepare)
  monkeypatch.setattr(throughput, 'COMPILERS', 2)
  model = ModelConfig(vocab_size=9, num_layers=1, model_dim=8, num_heads=1, head_dim=8)
  rows = throughput.measure(
    model, get_config(), tmp_path, lengths=[8, 16, 32], kinds=['train'], budget=5.0
  )
  assert [row['length'] for row in rows] == [8, 16]


def test_throughput_takes_what_fits_alone_and_one_model_s_parameters_at_a_time(
  monkeypatch, tmp_path
):
  """Programs that are compiled side by side may not fit beside each other."""
  asked = []

  def prepare(model, count, length, kind, *_):
    asked.append((kind, *model.config.pattern))
    if (kind, length) == ('decode', 8) and len(asked) < 4:
      raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')
    return lambda: throughput.Timing(0.5, count * length, 100)

  monkeypatch.setattr(throughput, '_prepare', prepare)
  monkeypatch.setattr(throughput, 'COMPILERS', 1)
  model = ModelConfig(vocab_size=9, num_layers=1, model_dim=8, num_heads=1, head_dim=8)
  rows = throughput.measure(
    model, get_config(), tmp_path, lengths=[8], mixers=['gdn', 'rdn'], kinds=['decode', 'train']
  )
  assert asked == [
    ('train', 'gdn'), ('train', 'rdn'), ('decode', 'gdn'), ('decode', 'gdn'), ('decode', 'rdn')
  ]
  assert all(row['tokens_per_second'] for row in rows)


def test_what_is_compiled_side_by_side(monkeypatch):
  entries = [
    ({'kind': kind, 'model': mixer, 'mixer': mixer, 'length': length}, '', None)
    for kind, mixer, length in (
      ('train', 'rdn', 8), ('train', 'gdn', 8), ('prefill', 'rdn', 8), ('decode', 'rdn', 8),
      ('prefill', 'gdn', 8), ('prefill', 'attention', 8), ('prefill', 'attention', 16),
      ('decode', 'attention', 8), ('decode', 'attention', 16),
    )
  ]  # fmt: skip
  monkeypatch.setattr(throughput, 'COMPILERS', 8)
  assert [len(group) for group in throughput._groups(entries)] == [2, 2, 1, 1, 1, 2]


def test_long_calls_are_timed_twice(monkeypatch):
  now = [0.0]

  def call():
    now[0] += 5
    return jnp.zeros(())

  monkeypatch.setattr(throughput.time, 'perf_counter', lambda: now[0])
  assert throughput._median(call) == 5.0 and now[0] == 15.0


def test_throughput_stops_at_other_errors(monkeypatch, tmp_path):
  def prepare(*args):
    raise jax.errors.JaxRuntimeError('no')

  monkeypatch.setattr(throughput, 'prepare_prefill', prepare)
  model = ModelConfig(vocab_size=9, num_layers=1, model_dim=8, num_heads=1, head_dim=8)
  with pytest.raises(jax.errors.JaxRuntimeError, match='no'):
    throughput.measure(model, get_config(), tmp_path, lengths=[8], kinds=['prefill'])


def test_another_mixer_in_the_same_model():
  config = ModelConfig(vocab_size=9, pattern=('rdn',), layer_options={'rdn': {'clip': None}})
  other = throughput.with_mixer(config, 'attention')
  assert other.pattern == ('attention',) and not other.layer_options
  assert other.model_dim == config.model_dim
  assert throughput.with_mixer(config, 'rdn') == config
  with pytest.raises(ValueError, match="no 'rdm'; did you mean 'rdn'"):
    throughput.with_mixer(config, 'rdm')


def test_softmax_layers_are_fused_where_the_device_can(monkeypatch):
  config = ModelConfig(vocab_size=9, num_layers=2, pattern=('rdn', 'attention'))
  assert throughput.with_fused_attention(config) == config
  monkeypatch.setattr('jax.default_backend', lambda: 'gpu')
  fused = throughput.with_fused_attention(config)
  assert fused.attributes_of('attention')['implementation'] == 'cudnn'
  assert fused.attributes_of('rdn')['implementation'] is None
  wide = dataclasses.replace(config, dtype='float32')  # the kernel takes half types only
  assert throughput.with_fused_attention(wide) == wide


def test_fused_attention_reads_a_prompt_in_one_piece(monkeypatch):
  model, params = models.small(pattern=('attention',))
  prompts = throughput._tokens(model, 2, 8)
  other = dataclasses.replace(model.config, layer_options={'attention': {'implementation': 'xla'}})
  pieces, _ = generation.prefill(model, params, prompts, chunk=4)
  whole = throughput._read_at_once(LanguageModel(other), params, prompts)
  np.testing.assert_allclose(whole, pieces, rtol=1e-5, atol=1e-5)
  monkeypatch.setattr(throughput, '_params', lambda model: params)
  monkeypatch.setattr(throughput, 'with_fused_attention', lambda config: other)
  monkeypatch.setattr(generation, 'prefill', None)
  assert throughput.prepare_prefill(model, 2, 8, 4)().tokens == 16
