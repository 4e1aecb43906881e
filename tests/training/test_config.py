"""Every key is documented; wrong values and combinations are refused by name."""

import inspect
import re

import pytest
from ml_collections import ConfigDict

from rla_jax import sharding
from rla_jax.training import ConfigError, get_config
from rla_jax.training import config as config_module
from rla_jax.training.config import FREE_KEYS, check, leaves, model_config, settled
from rla_jax.training.train import make_mesh


def test_every_key_has_a_comment():
  source = inspect.getsource(config_module.get_config)
  lines = re.findall(r'^  c\.([\w.]+) = (.*)$', source, re.MULTILINE)
  assert {name for name, _ in lines} >= {p for p in leaves(get_config()) if '.' not in p}
  for name, rest in lines:
    assert '#' in rest or name == 'data', name


def test_free_keys_exist():
  assert set(leaves(get_config())) >= FREE_KEYS


def test_unknown_keys_and_wrong_types_fail_where_they_are_written():
  config = get_config()
  with pytest.raises(AttributeError, match='seq_len'):
    config.data.seqlen = 8
  with pytest.raises(TypeError):
    config.steps = 'many'
  with pytest.raises(TypeError):
    config.data.path = 3  # None by default, but of type str.


@pytest.mark.parametrize(
  ('path', 'value', 'message'),
  [
    ('steps', 0, 'steps is 0, expected at least 1'),
    ('eval_tokens', 0, 'eval_tokens is 0'),
    ('optimizer.learning_rate', 0.0, 'optimizer.learning_rate is 0.0, expected more than 0'),
    ('optimizer.beta2', 1.0, 'optimizer.beta2 is 1.0'),
    ('optimizer.warmup_steps', 6, 'expected less than steps, 6'),
    ('optimizer.name', 'adam', "optimizer.name is 'adam', expected one of"),
    ('optimizer.schedule', 'linear', "optimizer.schedule is 'linear'"),
    ('ema_decay', 1.0, 'ema_decay is 1.0'),
    ('max_spike', 1.0, 'max_spike is 1.0, expected more than 1'),
    ('watchdog_seconds', 0.0, 'watchdog_seconds is 0.0, expected more than 0'),
    ('accumulate', 3, 'accumulate is 3, which does not divide data.batch_size, 8'),
    ('data.seq_len', 0, 'data: seq_len is 0'),
    ('model.dtype', 'float33', "model: dtype is 'float33'"),
    ('model.pattern', ('rdm',), "model: .*did you mean 'rdn'"),
    ('model.layer_options', ConfigDict({'attention': {'num_head': 1}}), 'num_heads'),
  ],
)
def test_values_that_are_refused(config, path, value, message):
  config.update_from_flattened_dict({path: value})
  with pytest.raises(ConfigError, match=message):
    check(config)


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'data.batch_size': 12}, 'batch_size is 12, .* 8 devices .*; mesh.data [*] mesh.fsdp = 4 '
     'would do, with the other 2 along mesh.tensor or mesh.seq, or 16 rows'),
    ({'data.batch_size': 32, 'accumulate': 8}, 'batch_size is 32, .* = 8; accumulate = 4 would do'),
    ({'mesh.data': 3}, 'data 3, .*does not fill 8 devices'),
    ({'mesh.fsdp': -1}, '-1 for one of them'),
    ({'mesh.data': 1, 'mesh.seq': 8, 'data.seq_len': 12}, 'mesh.seq is 8, .* not divide'),
  ],
)
def test_meshes_that_are_refused(config, overrides, message):
  config.update_from_flattened_dict(overrides)
  with pytest.raises(ConfigError, match=message):
    make_mesh(config)


@pytest.mark.parametrize(
  ('sizes', 'device_tokens', 'parts'),
  [
    ({}, 16 * 12, 1),
    ({}, 16 * 12 - 1, 2),
    ({}, 16, 12),
    ({}, 1, 12),  # A row at a time is the least.
    ({'data': 2, 'tensor': 4}, 16 * 12, 4),
    ({'data': 2, 'seq': 4}, 16 * 12, 1),
  ],
)
def test_a_batch_is_cut_in_no_more_parts_than_needed(config, sizes, device_tokens, parts):
  """96 rows of 16 tokens."""
  config.data.batch_size, config.accumulate, config.device_tokens = 96, None, device_tokens
  mesh = sharding.make_mesh(**sizes)
  assert settled(config, mesh).accumulate == parts
  assert config.accumulate is None
  config.accumulate = 3
  assert settled(config, mesh).accumulate == 3


def test_vocabulary_is_that_of_the_tokenizer_or_larger(config):
  assert model_config(config, 258).vocab_size == 258
  config.model.vocab_size = 300
  assert model_config(config, 258).vocab_size == 300
  with pytest.raises(ConfigError, match=r'model\.vocab_size is 300, smaller .* 301'):
    model_config(config, 301)
