"""Models whose scores are known, and a small one with random weights.

Equal models and shapes are compiled once for all tests: tests share CHUNK and BATCH_TOKENS.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rla_jax.data import load_tokenizer
from rla_jax.models import LanguageModel, ModelConfig

TOKENIZER = load_tokenizer('byte')
CHUNK, BATCH_TOKENS = 64, 256


@functools.cache
def small(pattern=('rdn',), vocab_size=TOKENIZER.vocab_size, seed=0, **options):
  """A model of one layer a pattern entry and random parameters, large enough to have opinions."""
  config = ModelConfig(
    vocab_size=vocab_size, num_layers=len(pattern), model_dim=16, ffn_dim=None, pattern=pattern,
    num_heads=2, head_dim=8, init_std=0.5, dtype='float32', remat='none',
    implementation='reference', **options,
  )  # fmt: skip
  model = LanguageModel(config)
  return model, jax.jit(_init, static_argnums=0)(model, jax.random.key(seed))


@functools.cache
def bigram(vocab_size=TOKENIZER.vocab_size, seed=0):
  """A model of bigrams: a real LanguageModel whose mixer adds nothing, and its ln p [S, S].

  The embedding is [S, D] with D = S: token s is the unit vector e_s, which the final norm scales to
  sqrt(S) e_s; the head's row s then holds the log probabilities of what follows s.
  """
  rng = np.random.default_rng(seed)
  log_p = np.log(rng.dirichlet(np.full(vocab_size, 0.3), vocab_size) + 1e-5)
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  config = ModelConfig(
    vocab_size=vocab_size, num_layers=1, model_dim=vocab_size, ffn_dim=None, pattern=('sgla',),
    num_heads=1, head_dim=1, norm_eps=1e-12, dtype='float32', remat='none',
    implementation='reference',
  )  # fmt: skip
  model = LanguageModel(config)
  shapes = jax.eval_shape(functools.partial(_init, model), jax.random.key(0))
  params = {
    'embedding': np.eye(vocab_size), 'head': log_p / np.sqrt(vocab_size),
    'final_norm': {'scale': np.ones(vocab_size)},
    'blocks': jax.tree.map(lambda x: np.zeros(x.shape), shapes['blocks']),
  }  # fmt: skip
  assert jax.tree.structure(params) == jax.tree.structure(shapes)
  return model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), log_p


def _init(model, key):
  return model.init(key, jnp.zeros((1, 2), jnp.int32))['params']
