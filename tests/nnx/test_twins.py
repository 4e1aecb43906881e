"""The NNX twins: the Linen layers' parameters, bits and cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

from rla_jax import layers, nnx
from tests.layers.helpers import WIDTH, error, inputs

SMALL = {'num_heads': 4, 'num_qk_heads': 2, 'head_dim': 8, 'implementation': 'chunked'}
TWINS = ['ResidualDeltaNet', 'ResidualLinearAttention']


def twins(name, **options):
  linen = getattr(layers, name)(**SMALL, **options)
  params = jax.jit(linen.init)(jax.random.key(1), inputs())['params']
  twin = getattr(nnx, name)(WIDTH, rngs=flax_nnx.Rngs(0), **SMALL, **options)
  return linen, params, twin


@pytest.mark.parametrize('name', TWINS)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_equal_weights_give_equal_bits(name, dtype):
  linen, params, twin = twins(name, dtype=dtype)
  own = flax_nnx.to_pure_dict(flax_nnx.state(twin, flax_nnx.Param))
  assert jax.tree.map(np.shape, own) == jax.tree.map(np.shape, dict(params))
  ids = jnp.asarray([[0] * 6 + [1] * 7] * 2)
  want = jax.jit(linen.apply)({'params': params}, inputs(), ids)
  run = flax_nnx.jit(lambda twin: twin(inputs(), ids))
  assert (run(twin) != want).any()
  nnx.load_linen_params(twin, params)
  np.testing.assert_array_equal(run(twin), want)


def test_cache_as_a_value_and_as_a_variable():
  linen, params, twin = twins('ResidualDeltaNet')
  nnx.load_linen_params(twin, params)
  variables, x = {'params': params}, inputs(6)
  held = nnx.DecodeCache(twin.init_cache(2))
  cache, value = linen.init_cache(2), twin.init_cache(2)
  step = flax_nnx.jit(lambda twin, x, held: twin(x, cache=held))
  pure = flax_nnx.jit(lambda twin, x, value: twin(x, cache=value))
  reference = jax.jit(lambda x, cache: linen.apply(variables, x, None, cache))
  for now in (slice(0, 4), slice(4, 5), slice(5, 6)):
    want, cache = reference(x[:, now], cache)
    got, value = pure(twin, x[:, now], value)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(step(twin, x[:, now], held), want)
  jax.tree.map(np.testing.assert_array_equal, held.get_value(), cache)
  jax.tree.map(np.testing.assert_array_equal, value, cache)


def test_gradients_equal_the_linen_ones():
  linen, params, twin = twins('ResidualDeltaNet')
  nnx.load_linen_params(twin, params)
  x = inputs()
  want = jax.jit(jax.grad(lambda p: (linen.apply({'params': p}, x) ** 2).sum()))(params)
  got = flax_nnx.jit(flax_nnx.grad(lambda twin: (twin(x) ** 2).sum()))(twin)
  got = flax_nnx.to_pure_dict(got)
  for name in want:
    assert error(got[name], want[name]) < 1e-6, name


def test_bad_arguments():
  with pytest.raises(ValueError, match="ResidualDeltaNet has no 'clp'; did you mean 'clip'"):
    nnx.ResidualDeltaNet(8, rngs=flax_nnx.Rngs(0), clp=1)
  twin = nnx.ResidualDeltaNet(8, rngs=flax_nnx.Rngs(0), num_heads=2, head_dim=4)
  x, cache = jnp.ones((2, 3, 8)), twin.init_cache(2)
  for held in (cache, nnx.DecodeCache(cache)):
    with pytest.raises(ValueError, match=r'^segment_ids is a \w+Cache; expected \[B, T\]'):
      twin(x, held)
    with pytest.raises(ValueError, match=r'^cache\.\S+ has shape \(2, .* init_cache\(1\)'):
      twin(x[:1], cache=held)
  with pytest.raises(ValueError, match=r'^x has dtype int32; expected a floating dtype'):
    twin(x.astype(int))
  params = flax_nnx.to_pure_dict(flax_nnx.state(twin, flax_nnx.Param))
  with pytest.raises(ValueError, match=r"'q_proj'.* has shape .*expected"):
    nnx.load_linen_params(twin, params | {'q_proj': jnp.ones((1, 1))})
  del params['q_proj']
  with pytest.raises(ValueError, match='params has'):
    nnx.load_linen_params(twin, params)
