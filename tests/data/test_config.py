"""A wrong setting is refused by name."""

import dataclasses

import pytest

from rla_jax.data import DataConfig

WRONG = {
  'seq_len': (0, 1.5, '8', True),
  'batch_size': (0, -1),
  'seed': (-1, 0.5),
  'validation_seed': (-1,),
  'num_threads': (0,),
  'prefetch_batches': (0,),
  'validation_fraction': (0.0, 1.0, -0.5, float('nan')),
  'format': ('csv',),
  'path': ('',),
  'validation_path': ('',),
  'document_separator': ('',),
  'cache_dir': ('',),
  'text_field': ('',),
  'tokenizer': ('',),
}


@pytest.mark.parametrize(('name', 'value'), [(n, v) for n, vs in WRONG.items() for v in vs])
def test_wrong_value(name, value):
  with pytest.raises(ValueError, match=name):
    DataConfig(**{'path': 'x', name: value})


def test_format_needs_a_path():
  with pytest.raises(ValueError, match='format'):
    DataConfig(format='jsonl')


def test_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    DataConfig().seq_len = 2
