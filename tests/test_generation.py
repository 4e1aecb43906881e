"""Generation: equals the whole-sequence model, whatever the chunks, blocks and neighbours."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.generation import filter_logits, generate, stream
from rla_jax.models import LanguageModel, ModelConfig

VOCABULARY, NEW = 40, 10
PROMPTS = [[5, 4, 3], list(range(20)), [7]]
MODEL = LanguageModel(
  ModelConfig(
    vocab_size=VOCABULARY, num_layers=2, model_dim=16, ffn_dim=None, num_heads=2, head_dim=8,
    pattern=('rdn', 'attention'), init_std=0.3, dtype='float32', implementation='reference',
  )
)
OPTIONS = {'prefill_chunk': 8, 'block': 4}


@pytest.fixture(scope='module')
def params():
  return jax.jit(MODEL.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']


@pytest.fixture(scope='module')
def greedy(params):
  return generate(MODEL, params, PROMPTS, NEW, temperature=0, **OPTIONS).tokens


def test_greedy_tokens_are_the_most_probable_of_the_whole_sequence(params, greedy):
  apply = jax.jit(MODEL.apply)
  for prompt, new in zip(PROMPTS, greedy):
    whole = np.zeros((1, 32), np.int32)  # causal, so what follows does not matter
    whole[0, : len(prompt) + NEW] = [*prompt, *new]
    logits = apply({'params': params}, whole)[0, len(prompt) - 1 : len(prompt) + NEW - 1]
    np.testing.assert_array_equal(new, np.argmax(logits, axis=-1))


def test_chunks_and_blocks_do_not_matter(params, greedy):
  got = generate(MODEL, params, PROMPTS, NEW, temperature=0, prefill_chunk=32, block=10)
  np.testing.assert_array_equal(got.tokens, greedy)


def test_samples_depend_on_prompt_row_and_seed_alone(params):
  options = {'temperature': 1.5, 'top_k': 30, 'top_p': 0.95, **OPTIONS}
  got = generate(MODEL, params, PROMPTS, NEW, seed=3, **options).tokens
  again = generate(MODEL, params, PROMPTS, NEW, seed=3, **options).tokens
  other = generate(MODEL, params, PROMPTS, NEW, seed=4, **options).tokens
  shorter = generate(MODEL, params, [PROMPTS[0], [1, 2], PROMPTS[2]], NEW, seed=3, **options).tokens
  np.testing.assert_array_equal(got, again)
  np.testing.assert_array_equal(got[[0, 2]], shorter[[0, 2]])
  assert (got != other).any() and (got[0] != got[2]).any()


def test_stop_token_ends_a_sequence(params, greedy):
  stop = int(greedy[0, 2])
  got = generate(MODEL, params, PROMPTS, NEW, temperature=0, stop_token=stop, **OPTIONS)
  for row, length, free in zip(got.tokens, got.lengths, greedy):
    hits = np.flatnonzero(free == stop)
    want = hits[0] + 1 if len(hits) else NEW
    assert length == want
    np.testing.assert_array_equal(row[:want], free[:want])
    assert (row[want:] == stop).all()
  blocks = list(
    stream(MODEL, params, PROMPTS[:1], 100, temperature=0, stop_token=stop, **OPTIONS)
  )
  assert [block.shape for block in blocks] == [(1, 4)]


def test_filters_keep_what_they_say():
  logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))
  kept = {
    (None, None): [0, 1, 2, 3], (2, None): [1, 3], (1, None): [1], (None, 0.5): [1, 3],
    (None, 0.75): [1, 2, 3], (None, 1e-6): [1], (None, 1.0): [0, 1, 2, 3], (3, 0.4): [1],
    # After top_k = 2 the two left have 4/7 and 3/7.
    (2, 0.6): [1, 3],
  }  # fmt: skip
  for (top_k, top_p), want in kept.items():
    got = np.flatnonzero(np.isfinite(filter_logits(logits, top_k, top_p)[0]))
    np.testing.assert_array_equal(got, want, err_msg=f'{top_k} {top_p}')


def test_first_tokens_follow_the_models_distribution(params):
  """2,000 rows of one prompt: frequencies at temperature 1 against probabilities."""
  rows = 2000
  got = generate(MODEL, params, [[3, 1]] * rows, 1, block=1, prefill_chunk=2).tokens[:, 0]
  logits = jax.jit(MODEL.apply)({'params': params}, jnp.asarray([[3, 1]]))[0, -1]
  probability = np.asarray(jax.nn.softmax(logits), np.float64)
  frequency = np.bincount(got, minlength=VOCABULARY) / rows
  deviation = np.sqrt(probability * (1 - probability) / rows)
  assert (np.abs(frequency - probability) < 5 * deviation + 1e-3).all()


def test_32k_tokens_need_no_more_memory_than_the_first():
  """What the process holds after every block, and the cache of a recurrent layer by length."""
  model = LanguageModel(dataclasses.replace(MODEL.config, num_layers=1, pattern=('rdn',)))
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))['params']
  held, made = [], 0
  for block in stream(model, params, PROMPTS, 2**15, temperature=0, block=4096, prefill_chunk=8):
    made += block.shape[1]
    held.append(sum(x.nbytes for x in jax.live_arrays()))
  assert made == 2**15
  assert max(held) <= held[0]
  short, long = (jax.eval_shape(lambda n=n: model.init_cache(3, n)) for n in (1, 2**15))
  assert short == long
  grown = (jax.eval_shape(lambda n=n: MODEL.init_cache(3, n)) for n in (1, 2**15))
  assert operator.ne(*grown)  # as it does where a layer is attention


BAD = [
  ({'prompt_tokens': []}, 'prompt_tokens is empty'),
  ({'prompt_tokens': [[]]}, r'prompt_tokens\[0\] has shape \(0,\)'),
  ({'prompt_tokens': [np.zeros(0, np.int32)]}, r'shape \(0,\) and dtype int32'),
  ({'prompt_tokens': [1, 2]}, r'prompt_tokens\[0\] has shape \(\)'),
  ({'prompt_tokens': [[40]]}, r'expected ids in \[0, 40\)'),
  ({'max_new_tokens': 0}, 'max_new_tokens is 0'),
  ({'temperature': -1}, 'temperature is -1'),
  ({'top_k': 41}, 'top_k is 41'),
  ({'top_p': 0.0}, 'top_p is 0.0'),
  ({'stop_token': 40}, 'stop_token is 40'),
  ({'block': 0}, 'block is 0'),
]


@pytest.mark.parametrize('changes,message', BAD, ids=[m for _, m in BAD])
def test_bad_arguments(changes, message, params):
  arguments = {'prompt_tokens': [[1]], 'max_new_tokens': 2} | changes
  with pytest.raises(ValueError, match=message):
    generate(MODEL, params, **arguments)
