"""ModelConfig: what is wrong fails at once, by name."""

import dataclasses

import pytest

from rla_jax.models import ModelConfig

BAD = [
  ({'patern': ('rdn',)}, "ModelConfig has no 'patern'; did you mean 'pattern'?"),
  ({'pattern': ('rdm',)}, "has no 'rdm'; did you mean 'rdn'?"),
  ({'pattern': 'rdn'}, "pattern is 'rdn'; expected a sequence of layer names"),
  ({'pattern': ()}, 'expected a multiple of the length of pattern'),
  ({'num_layers': 5, 'pattern': ('rdn', 'rla')}, 'num_layers is 5; expected a multiple'),
  ({'num_layers': 0}, 'num_layers is 0; expected an int >= 1'),
  ({'vocab_size': 7.5}, 'vocab_size is 7.5; expected an int >= 1'),
  ({'ffn_dim': 0}, 'ffn_dim is 0; expected an int >= 1 or None'),
  ({'layer_options': {'rla': {}}}, "the pattern has no 'rla'"),
  ({'layer_options': {'rdn': {'clp': 1}}}, "layer 'rdn' has no 'clp'; did you mean 'clip'?"),
  ({'layer_options': {'rdn': {'clip': -1}}}, 'clip is -1; expected a number > 0'),
  ({'remat': 'al'}, "remat is 'al'; expected one of ['none', 'full', 'dots', 'names', 'both']"),
  ({'dtype': 'int32'}, "dtype is 'int32'; expected a floating dtype"),
  ({'dtype': 'bf16'}, "dtype is 'bf16'; expected a floating dtype"),
  ({'init_std': 0.0}, 'init_std is 0.0; expected a number > 0'),
  ({'embedding_dropout': 1.0}, 'embedding_dropout is 1.0; expected 0 <= p < 1'),
  ({'norm': 'batch'}, "norm is 'batch'; expected one of ['rms', 'layer']"),
]


@pytest.mark.parametrize('changes,message', BAD, ids=[m for _, m in BAD])
def test_bad_configs(changes, message):
  with pytest.raises(ValueError) as caught:
    ModelConfig.from_dict({'vocab_size': 10} | changes)
  assert message in str(caught.value)


def test_round_trip_and_hash():
  options = {'rdn': {'clip': None, 'implementation': ['triton', 'chunked']}}
  config = ModelConfig(vocab_size=10, layer_options=options)
  values = config.to_dict()
  assert type(values['layer_options']) is dict and type(values['layer_options']['rdn']) is dict
  assert ModelConfig.from_dict(values) == config and hash(ModelConfig.from_dict(values))
  assert dataclasses.replace(config, num_layers=4).num_layers == 4


def test_attributes_reach_the_layers():
  config = ModelConfig(
    vocab_size=10, num_layers=2, pattern=('rdn', 'attention'), num_heads=4, head_dim=32,
    chunk_size=16, implementation='reference',
    layer_options={'attention': {'num_heads': 8}, 'rdn': {'clip': 2.0}},
  )  # fmt: skip
  rdn, attention = (config.attributes_of(name) for name in config.pattern)
  assert attention == {'num_heads': 8, 'head_dim': 32, 'exchange_heads': False}
  assert rdn == {
    'num_heads': 4, 'head_dim': 32, 'norm_eps': 1e-6, 'chunk_size': 16,
    'implementation': 'reference', 'exchange_heads': False, 'clip': 2.0,
  }  # fmt: skip
