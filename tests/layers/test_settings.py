"""Attributes: every piece of the ablation changes the output; bad values fail with their name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import layers
from rla_jax.layers import recurrent
from tests.layers import helpers

SWITCHES = {
  'update': {'update': 'additive'},
  'residual': {'residual': False},
  'gamma_is_beta': {'gamma_is_beta': True},
  'clip': {'clip': None},
  'clip_value': {'clip': 0.5},
  'readout': {'readout': 'sum'},
  'two_states': {'residual': False, 'two_states': True},
  'decay_none': {'decay': 'none'},
  'decay_fixed': {'decay': 'fixed'},
  'decay_channel': {'decay': 'channel'},
  'decay_sigmoid': {'decay': 'channel_sigmoid', 'decay_rank': 3},
  'write_one': {'write': 'one'},
  'write_step': {'write': 'step'},
  'neg_eigval': {'allow_neg_eigval': True},
  'conv': {'conv_width': None},
  'conv_width': {'conv_width': 2},
  'activation': {'activation': 'none'},
  'qk_norm': {'qk_norm': False},
  'query_scale': {'query_scale': 1.0},
  'rope': {'rope_base': 100.0},
  'gate_off': {'output_gate': 'none'},
  'gate_sigmoid': {'output_gate': 'sigmoid'},
  'gate_low_rank': {'low_rank_gate': True},
  'norm_off': {'output_norm': 'none'},
  'norm_after_gate': {'output_norm': 'gated'},
  'skip': {'skip': True},
  'norm_eps': {'norm_eps': 0.1},
  'ungrouped': {'num_qk_heads': None},
  'expand_v': {'expand_v': 2.0},
}


def small(**changes):
  return layers.Settings(
    **{'num_heads': 4, 'num_qk_heads': 2, 'head_dim': 4, 'implementation': 'reference'} | changes
  )


def parameters(s):
  """Parameters that depend on their name and shape alone, so equal ones are shared by settings."""
  made = {}
  for name, (shape, init) in recurrent.parameters(s, helpers.WIDTH).items():
    key = jax.random.fold_in(jax.random.key(0), sum(name.encode()))
    made[name] = init(key, shape, jnp.float32)
  # Values beyond the clip.
  return made | {'v_proj': 6 * made['v_proj']}


@pytest.fixture(scope='module')
def default_output():
  return recurrent.mix(small(), parameters(small()), helpers.inputs(6))[0]


@pytest.mark.parametrize('switch', SWITCHES)
def test_every_switch_changes_the_output(switch, default_output):
  s = small(**SWITCHES[switch])
  y = recurrent.mix(s, parameters(s), helpers.inputs(6))[0]
  assert y.shape == default_output.shape and np.isfinite(y).all()
  assert helpers.error(y, default_output) > 1e-3


def test_one_gate_less():
  """gamma := beta, and no residual, drop the projection of gamma and nothing else."""
  full = set(recurrent.parameters(small(), 8))
  for change in ({'gamma_is_beta': True}, {'residual': False}):
    assert full - set(recurrent.parameters(small(**change), 8)) == {'gamma_proj'}


BAD = [
  ({'update': 'delt'}, "update is 'delt'; expected one of ['additive', 'delta']"),
  ({'readout': None}, 'readout is None; expected one of'),
  ({'decay': 'scaler'}, "decay is 'scaler'"),
  ({'num_heads': 0}, 'num_heads is 0; expected an int >= 1'),
  ({'num_heads': True}, 'num_heads is True'),
  ({'head_dim': 8.0}, 'head_dim is 8.0; expected an int >= 1'),
  ({'num_qk_heads': 3}, 'num_qk_heads is 3; expected a divisor of num_heads = 4'),
  ({'conv_width': 0}, 'conv_width is 0; expected an int >= 1 or None'),
  ({'expand_v': 0.3}, 'expand_v is 0.3; expected head_dim * expand_v to be a whole number'),
  ({'clip': 0.0}, 'clip is 0.0; expected a number > 0, or None'),
  ({'clip': -1}, 'clip is -1'),
  ({'two_states': True}, 'two_states is True and residual is True'),
  ({'allow_neg_eigval': True, 'write': 'one'}, "allow_neg_eigval is True and write is 'one'"),
  ({'write': 'step', 'decay': 'channel'}, "write is 'step' and decay is 'channel'"),
  ({'residual': False, 'gamma_is_beta': True}, 'gamma_is_beta is True without a second state'),
]


@pytest.mark.parametrize('changes,message', BAD, ids=[str(sorted(c)) + m[-9:] for c, m in BAD])
def test_bad_settings(changes, message):
  with pytest.raises(ValueError) as caught:
    small(**changes)
  assert message in str(caught.value)


def test_the_modules_check_too():
  with pytest.raises(ValueError, match='clip is -1'):
    layers.ResidualDeltaNet(clip=-1)
  with pytest.raises(ValueError, match='num_kv_heads is 3'):
    layers.Attention(num_heads=4, num_kv_heads=3)
  with pytest.raises(ValueError, match='expected 3 dimensions'):
    layers.ResidualDeltaNet(num_heads=2, head_dim=4).init(jax.random.key(0), jnp.ones((3, 8)))


def test_settings_are_equal_and_hash_by_value():
  assert small() == small() and hash(small()) == hash(small())
  assert small() != small(clip=None)
  module = layers.ResidualDeltaNet(num_heads=4, head_dim=4)
  assert module.plain() == layers.Settings(num_heads=4, head_dim=4)
