"""The table places every parameter, and no mesh changes what is learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import sharding
from rla_jax.models import PRESETS, LanguageModel
from rla_jax.training.config import model_config
from rla_jax.training.evaluate import loss_sums, to_devices
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.state import abstract_state, create_state, initializer
from rla_jax.training.step import train_step


def test_mesh_fills_the_devices():
  assert dict(sharding.make_mesh().shape) == {'data': 8, 'fsdp': 1, 'seq': 1, 'tensor': 1}
  mesh = sharding.make_mesh(data=2, fsdp=-1, tensor=2)
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 2, 'seq': 1, 'tensor': 2}
  with pytest.raises(ValueError, match='does not fill 8 devices; expected'):
    sharding.make_mesh(data=3, fsdp=-1)


@pytest.mark.parametrize('name', sorted(PRESETS))
def test_every_parameter_of_the_paper_s_models_has_a_rule(name):
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  model = LanguageModel(PRESETS[name])
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
  placed = sharding.shardings(shapes, mesh)
  for x, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True):
    if x.size > sharding.SMALL:
      assert np.prod(place.shard_shape(x.shape)) <= x.size / 2
  assert 'total' in sharding.table(shapes, placed)


def test_a_large_array_without_rule_is_an_error():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match='no sharding rule for params/strange, shape'):
    sharding.spec_of('params/strange', (1024, 1024), mesh)
  assert sharding.spec_of('params/strange', (4,), mesh) == jax.P()


def test_a_dimension_that_does_not_divide_is_an_error():
  mesh = sharding.make_mesh(data=1, fsdp=8)
  with pytest.raises(ValueError, match=r'a/q_proj, shape \(12, 4\): .* does not divide 12'):
    sharding.spec_of('a/q_proj', (12, 4), mesh)


def test_no_device_ever_holds_the_whole_state(config):
  """Nor a whole parameter: each makes its own part."""
  mesh = sharding.make_mesh(data=1, fsdp=8)
  config.model.update({'model_dim': 64, 'ffn_dim': 64})
  model, optimizer = LanguageModel(model_config(config, 4096)), make_optimizer(config)
  placed = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, mesh))
  create = jax.jit(initializer(model, optimizer), out_shardings=placed)
  found = create.lower(jax.random.key(0)).compile().memory_analysis()
  whole = 4096 * 64 * 4  # Bytes of the embedding; the head has as many, and Adam two moments each.
  assert found.output_size_in_bytes < 6 * whole / 8 * 1.1
  assert found.temp_size_in_bytes < whole


def two_steps(config, mesh):
  """Losses and parameters of two steps of a small RDN on a mesh."""
  rng = np.random.default_rng(0)
  batch = {
    'tokens': rng.integers(0, 30, (8, 16), np.int32),
    'targets': rng.integers(0, 30, (8, 16), np.int32),
    'segment_ids': np.repeat([[1, 2]], 8, axis=1).reshape(8, 2).repeat(8, axis=1).astype(np.int32),
    'loss_mask': rng.integers(0, 2, (8, 16)).astype(np.float32),
  }
  with jax.set_mesh(mesh):
    model = LanguageModel(model_config(config, 32))
    optimizer = make_optimizer(config)
    abstract = abstract_state(model, optimizer, mesh)
    state = create_state(model, optimizer, abstract, seed=0)
    step = jax.jit(functools.partial(
      train_step, loss_sums=functools.partial(loss_sums, model), optimizer=optimizer, config=config
    ))  # fmt: skip
    losses = []
    for _ in range(2):
      state, result = step(state, to_devices(batch, mesh))
      losses.append((float(result['loss']), float(result['grad_norm'])))
  return losses, jax.device_get(state.params)


@pytest.mark.parametrize(
  'layer', ['attention', pytest.param('rdn', marks=pytest.mark.slow)]  # slow to compile
)
def test_eight_devices_learn_what_one_does(config, layer):
  config.model.pattern = (layer,)
  config.model.chunk_size = 8
  one = two_steps(config, sharding.make_mesh(devices=jax.devices()[:1]))
  config.accumulate = 2
  losses, params = two_steps(config, sharding.make_mesh(data=2, fsdp=2, tensor=2))
  np.testing.assert_allclose(losses, one[0], rtol=1e-5)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, params, one[1])
