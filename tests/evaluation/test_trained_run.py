"""From a training run on a synthetic task to its suite; what is no such run is one line."""

import json

import pytest

from rla_jax.data import DataError
from rla_jax.data.synthetic import tasks
from rla_jax.evaluation import Settings, run_suites
from rla_jax.training import (
  CheckpointError,
  TrainingError,
  WorkdirError,
  get_config,
  train_and_evaluate,
)
from tests.evaluation import models

SETTINGS = Settings(chunk=models.CHUNK, batch_tokens=models.BATCH_TOKENS)


@pytest.fixture(scope='module')
def parity(tmp_path_factory):
  """A run of two steps on parity; its examples stay small for the whole module."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tasks, 'STATE_TRACKING_TRAIN', 16)
    patch.setattr(tasks, 'STATE_TRACKING_TEST', 8)
    config = get_config()
    config.update_from_flattened_dict({
      'steps': 2, 'optimizer.warmup_steps': 0, 'model.pattern': ('sgla',), 'model.num_layers': 1,
      'model.model_dim': 16, 'model.ffn_dim': None, 'model.num_heads': 2, 'model.head_dim': 8,
      'model.remat': 'none', 'model.implementation': 'reference', 'model.dtype': 'float32',
      'data.format': 'synthetic', 'data.path': 'parity', 'data.seq_len': 8, 'mesh.data': 1,
      'mesh.fsdp': -1,
    })  # fmt: skip
    folder = tmp_path_factory.mktemp('runs') / 'parity'
    train_and_evaluate(config, folder)
    yield folder


def test_a_run_is_judged_by_its_task(parity, tmp_path):
  found, skipped = run_suites(parity, ['state_tracking'], tmp_path, SETTINGS)
  assert [r.metric for r in found] == [
    'accuracy', 'accuracy_parity_L8', 'accuracy_parity_L16', 'accuracy_parity_L32'
  ]  # fmt: skip
  assert all(0.2 < r.value < 0.8 for r in found)
  assert set(skipped) == {'modular_arithmetic', 'permutations'}
  with pytest.raises(DataError, match=r'nothing to evaluate on: .*trained on ids'):
    run_suites(parity, ['needle_s1'], tmp_path, SETTINGS)


def test_a_checkpoint_of_another_model_is_one_line(parity, tmp_path):
  config = json.loads((parity / 'config.json').read_text())
  (parity / 'config.json').write_text(json.dumps(config | {'model.model_dim': 24}))
  try:
    with pytest.raises(CheckpointError) as error:
      run_suites(parity, ['parity'], tmp_path, SETTINGS)
  finally:
    (parity / 'config.json').write_text(json.dumps(config))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('name', 'error', 'message'),
  [('none', WorkdirError, 'is no workdir of a training run'), ('', TrainingError, 'no workdir')],
)
def test_what_is_no_run_is_one_line(name, error, message, tmp_path):
  with pytest.raises(error, match=message) as caught:
    run_suites(tmp_path / name, ['parity'], tmp_path / 'out', SETTINGS)
  assert '\n' not in str(caught.value)
