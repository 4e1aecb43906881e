"""Small layers and measures that the tests of layers and models share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rla_jax import layers
from rla_jax.layers import registry
from tests.errors import error as error

BATCH, LENGTH, WIDTH, HEADS, GROUPS, WINDOW = 2, 13, 24, 4, 2, 4
ALL = sorted(layers.LAYERS)
RECURRENT = [name for name in ALL if 'num_qk_heads' in registry.attributes(name)]
# Documents of 4, 5, 4 tokens and of 1, 1, 11; the first and last of a row share an id.
SEGMENT_IDS = np.array([[3] * 4 + [7] * 5 + [3] * 4, [0] + [1] + [0] * 11], np.int32)


def make(name, **options):
  """A small layer: 4 heads over 2 groups of size 8, by the token-by-token operator."""
  if name in ('base_conv', 'identity'):
    small = {'model_dim': WIDTH} if name == 'base_conv' else {}
    return layers.make(name, **(small | options))
  small = {'num_heads': HEADS, 'head_dim': 8}
  if name in RECURRENT:
    small |= {'num_qk_heads': GROUPS, 'implementation': 'reference'}
  else:
    small |= {'num_kv_heads': GROUPS}
  if name == 'sliding_window_attention':
    small |= {'window': WINDOW}
  return layers.make(name, **(small | options))


def inputs(length=LENGTH, batch=BATCH, seed=0, dtype=jnp.float32):
  """Activations [batch, length, WIDTH]."""
  return jax.random.normal(jax.random.key(seed), (batch, length, WIDTH), dtype)


def init(layer, seed=1):
  """Parameters of a layer; values three times the usual, so that the clip has work to do."""
  params = dict(jax.jit(layer.init)(jax.random.key(seed), inputs()).get('params', {}))
  if 'v_proj' in params:
    params['v_proj'] = 3 * params['v_proj']
  return params


def run_pieces(layer, params, x, segment_ids, cuts):
  """The layer over pieces of x, the cache handed on. Returns y and all caches."""
  cache = layer.init_cache(x.shape[0], x.shape[1], x.dtype)
  outputs, caches = [], [cache]
  for start, stop in itertools.pairwise(cuts):
    ids = None if segment_ids is None else segment_ids[:, start:stop]
    y, cache = layer.apply({'params': params}, x[:, start:stop], ids, cache)
    outputs.append(y)
    caches.append(cache)
  return jnp.concatenate(outputs, axis=1), caches
