"""Every layer of the registry equals its published equations, written in numpy."""

import dataclasses

import jax
import numpy as np
import pytest

from rla_jax import layers
from rla_jax.layers import registry
from tests.layers import helpers, numpy_layers


@pytest.mark.parametrize('name', helpers.ALL)
def test_equals_the_equations(name):
  layer = helpers.make(name)
  params, x = helpers.init(layer), helpers.inputs(batch=1)
  # Vectors away from their initial ones and zeros, so that each of them matters.
  for leaf in ('norm_scale', 'skip_scale', 'dt_bias', 'gate_bias', 'x_bias'):
    if leaf in params:
      shift = jax.random.normal(jax.random.key(5), params[leaf].shape)
      params[leaf] = params[leaf] + 0.5 * shift
  y = jax.jit(layer.apply)({'params': params}, x)
  p = {key: np.asarray(value, np.float64) for key, value in params.items()}
  x = np.asarray(x[0], np.float64)
  groups = 1 if name == 'mamba2' and layer.num_qk_heads == 1 else helpers.GROUPS
  want = numpy_layers.layer(name, p, x, helpers.HEADS, groups, helpers.WINDOW)
  assert helpers.error(y[0], want) < 1e-5


def test_two_state_control_has_the_parameters_and_state_of_rdn():
  rdn, control = helpers.make('rdn'), helpers.make('two_state')
  shapes = [jax.tree.map(np.shape, helpers.init(layer)) for layer in (rdn, control)]
  assert shapes[0] == shapes[1]

  def state_size(layer):
    return sum(leaf.size for leaf in jax.tree.leaves(layer.init_cache(1).state))

  assert state_size(rdn) == state_size(control) == 2 * state_size(helpers.make('gdn'))


def test_unknown_layer_and_attribute_suggest_the_near_name():
  with pytest.raises(ValueError, match="no 'rdm'; did you mean 'rdn'"):
    layers.make('rdm')
  with pytest.raises(ValueError, match="layer 'rdn' has no 'clp'; did you mean 'clip'"):
    layers.make('rdn', clp=1.0)


def test_settings_are_the_attributes():
  fields = {field.name for field in dataclasses.fields(layers.Settings)}
  assert set(registry.attributes('rdn')) == fields
