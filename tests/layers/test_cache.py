"""However a sequence is cut into calls, the outputs are the same; a cache keeps its shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.layers import helpers

CUTS = [0, 5, 5, 9, 10, 11, 13]  # an empty piece, and single tokens


@pytest.mark.parametrize(
  'name,packed', [*((name, True) for name in helpers.ALL), ('rdn', False), ('attention', False)]
)
def test_pieces_equal_the_whole(name, packed):
  layer, x = helpers.make(name), helpers.inputs()
  params = helpers.init(layer)
  ids = jnp.asarray(helpers.SEGMENT_IDS) if packed else None

  @jax.jit
  def run(params):
    whole = layer.apply({'params': params}, x, ids)
    return whole, *helpers.run_pieces(layer, params, x, ids, CUTS)

  whole, pieces, caches = run(params)
  assert helpers.error(pieces, whole) < 2e-6
  kinds = [jax.tree.map(lambda a: (a.shape, a.dtype), cache) for cache in caches]
  assert all(kind == kinds[0] for kind in kinds)


@pytest.mark.parametrize('name', ['rdn', 'rla', 'kda', 'sliding_window_attention'])
def test_token_by_token_in_a_scan(name):
  layer, x = helpers.make(name), helpers.inputs(40)
  params = helpers.init(layer)

  @jax.jit
  def decode(params, x):
    def step(cache, x_BD):
      y, cache = layer.apply({'params': params}, x_BD[:, None], None, cache)
      return cache, y[:, 0]

    _, y_TBD = jax.lax.scan(step, layer.init_cache(2, dtype=x.dtype), jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(y_TBD, 0, 1)

  assert helpers.error(decode(params, x), jax.jit(layer.apply)({'params': params}, x)) < 2e-6


def test_chunked_prefill_of_a_bf16_layer():
  layer = helpers.make('rdn', implementation='chunked', dtype=jnp.bfloat16)
  params, x = helpers.init(layer), helpers.inputs(70)
  cache = layer.init_cache(2)
  assert cache.tails['q'].dtype == jnp.bfloat16 and cache.state.base.dtype == jnp.float32

  @jax.jit
  def run(params):
    first, cache_1 = layer.apply({'params': params}, x[:, :69], None, cache)
    last, _ = layer.apply({'params': params}, x[:, 69:], None, cache_1)
    return jnp.concatenate([first, last], axis=1), layer.apply({'params': params}, x)

  pieces, whole = run(params)
  assert pieces.dtype == jnp.bfloat16
  assert helpers.error(pieces, whole) < 5e-3


def test_ids_of_a_later_call_continue_or_start_a_document():
  layer, x = helpers.make('rdn'), helpers.inputs(8)
  variables = {'params': helpers.init(layer)}
  ones = jnp.ones((2, 4), jnp.int32)
  apply = jax.jit(layer.apply)
  _, cache = apply(variables, x[:, :4], ones, layer.init_cache(2))
  same, _ = apply(variables, x[:, 4:], ones, cache)
  implied, _ = apply(variables, x[:, 4:], None, cache)
  other, _ = apply(variables, x[:, 4:], 2 * ones, cache)
  alone = apply(variables, x[:, 4:])
  assert helpers.error(implied, same) < 1e-6
  assert helpers.error(other, alone) < 1e-6 < helpers.error(same, alone)


def test_gradient_through_a_cache():
  layer, x = helpers.make('rdn'), helpers.inputs(7)
  params = helpers.init(layer)
  weight = jax.random.normal(jax.random.key(3), x.shape)

  def loss(params, pieces):
    if pieces:
      y, _ = helpers.run_pieces(layer, params, x, None, [0, 6, 7])
    else:
      y = layer.apply({'params': params}, x)
    return (weight * y).sum()

  got, want = (jax.jit(jax.grad(loss), static_argnums=1)(params, p) for p in (True, False))
  for name in params:
    assert helpers.error(got[name], want[name]) < 1e-5, name


def test_a_full_attention_cache_answers_nan():
  layer, x = helpers.make('attention'), helpers.inputs(4)
  variables = {'params': helpers.init(layer)}
  apply = jax.jit(layer.apply)
  y, cache = apply(variables, x, None, layer.init_cache(2, 4))
  assert np.isfinite(y).all()
  assert np.isnan(apply(variables, x[:, :1], None, cache)[0]).all()
  with pytest.raises(ValueError, match='max_length is None'):
    layer.init_cache(2)


@pytest.mark.parametrize('name', ['rdn', 'attention', 'sliding_window_attention', 'base_conv'])
def test_bad_calls_name_the_argument(name):
  layer, x, ids = helpers.make(name), helpers.inputs(5), jnp.zeros((2, 5), jnp.int32)
  variables = {'params': helpers.init(layer)}
  cache, other = layer.init_cache(2, 9), layer.init_cache(3, 9)
  kind = type(cache).__name__
  wrong = [
    ((x[0],), r'^x has shape \(5, 24\); expected 3 dimensions \[B, T, D\]'),
    (([1.0],), r'^x is a list; expected an array \[B, T, D\]'),
    ((ids[..., None],), '^x has dtype int32; expected a floating dtype'),
    ((x, cache), rf'^segment_ids is a {kind}; expected \[B, T\] = \(2, 5\)'),
    ((x, ids[0]), r'^segment_ids has shape \(5,\); expected \[B, T\] = \(2, 5\)'),
    ((x, x[..., 0]), '^segment_ids has dtype float32; expected an integer dtype'),
    ((x, None, ids), f'^cache has type ArrayImpl; expected {kind}'),
    ((x, None, other), r'^cache\.\S+ has shape \(3, .*; expected shape \(2, .* init_cache\(2\)'),
  ]
  for arguments, message in wrong:
    with pytest.raises(ValueError, match=message):
      layer.apply(variables, *arguments)


def test_a_cache_of_another_layer_is_refused():
  x = helpers.inputs(5)
  rdn, gdn = helpers.make('rdn'), helpers.make('gdn')
  for layer, other, message in (
    (rdn, gdn, r'cache\.state\.residual has no array; expected shape \(2, 4, 8, 8\)'),
    (gdn, rdn, r'cache\.state\.residual has shape \(2, 4, 8, 8\); expected no array'),
    (rdn, helpers.make('attention'), 'cache has type AttentionCache; expected RecurrentCache'),
  ):
    with pytest.raises(ValueError, match=message):
      layer.apply({'params': helpers.init(layer)}, x, None, other.init_cache(2, 9))


def test_a_cache_under_vmap():
  layer, x = helpers.make('rdn'), helpers.inputs(5)
  variables, one = {'params': helpers.init(layer)}, layer.init_cache(1)
  each = jax.vmap(lambda x: layer.apply(variables, x[None], None, one)[0][0])
  assert helpers.error(jax.jit(each)(x), jax.jit(layer.apply)(variables, x)) < 2e-6
