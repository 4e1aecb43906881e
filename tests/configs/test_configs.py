"""Every config loads, lists every key, passes the checks and builds a model of the right size."""

import pathlib
import runpy

import pytest

from rla_jax.models import count_parameters
from rla_jax.training.config import check, get_config, leaves, model_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))
BILLIONS = {
  'rdn_1p5b': 1.55, 'rla_1p5b': 1.55, 'gdn_1p5b': 1.55, 'sgla_1p5b': 1.55, 'transformer_1p5b': 1.51
}  # fmt: skip


def load(path):
  return runpy.run_path(str(path))


def test_all_are_here():
  assert set(BILLIONS) | {'quickstart'} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_docstring_is_the_record(path):
  text = load(path)['__doc__']
  for field in ('Reproduces:', 'Command:', 'Hardware:', 'Wall time:', 'Result:'):
    assert f'\n{field}' in text, field


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_lists_every_key_and_builds(path):
  config = load(path)['get_config']()
  assert config.is_locked

  def names(c):
    return {name for name in leaves(c) if not name.startswith('model.layer_options.')}

  assert names(config) == names(get_config())
  check(config)
  parameters = count_parameters(model_config(config, vocab_size=258))
  if path.stem in BILLIONS:
    assert parameters == pytest.approx(BILLIONS[path.stem] * 1e9, rel=0.02)
  else:
    assert parameters > 0


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('mqar', 'rla_equal_state,128'), ('needle', 'gdn,needle_s2'),
    ('state_tracking', 'delta_net,parity,negative'),
  ],
)  # fmt: skip
def test_words_behind_the_file_choose_among_configs(name, words):
  get_config = load(ROOT / 'configs' / f'{name}.py')['get_config']
  config = get_config(words)
  check(config)
  assert leaves(config) != leaves(get_config())
  assert count_parameters(model_config(config, vocab_size=258)) < 1e7


@pytest.mark.parametrize(
  ('name', 'words', 'message'),
  [
    ('mqar', 'rdm', "unknown mixer 'rdm'; expected one of attention, "),
    ('mqar', 'rdn,65', "the width is '65'; expected a multiple of 32"),
    ('needle', 'rdn,needle', "unknown task 'needle'; expected one of needle_s1, "),
    ('needle', 'rdm,needle_s1', "unknown mixer 'rdm'; expected one of rdn, "),
    ('state_tracking', 'rdn,sum', 'expected MIXER,TASK or with ,negative'),
  ],
)
def test_wrong_words_are_one_line(name, words, message):
  with pytest.raises(ValueError, match=message):
    load(ROOT / 'configs' / f'{name}.py')['get_config'](words)


@pytest.mark.parametrize('name', sorted(BILLIONS))
def test_the_paper_s_settings(name):
  c = load(ROOT / 'configs' / f'{name}.py')['get_config']()
  tokens = c.data.batch_size * c.data.seq_len
  assert tokens == pytest.approx(4e6, rel=0.05)
  assert c.steps * tokens == pytest.approx(100e9, rel=0.01)
  assert c.optimizer.warmup_steps * tokens == pytest.approx(0.5e9, rel=0.01)
  o = c.optimizer
  assert (o.learning_rate, o.final_learning_rate, o.weight_decay) == (3e-4, 3e-5, 0.1)
  assert (o.clip_norm, c.model.init_std) == (1.0, 0.006)
  assert (c.model.num_layers, c.model.model_dim, c.model.ffn_dim) == (16, 2048, 8192)
