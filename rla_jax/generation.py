"""Sampling from a language model: prefill in chunks, then the recurrent step, token by token.

Memory is constant for recurrent layers; attention layers hold the keys and values of what they have
seen. Few shapes are compiled: prompts are padded on the left to whole chunks (the padding is a
document of its own, which the model forgets), and tokens are made in blocks.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rla_jax.models import LanguageModel
from rla_jax.shapes import Array, Float, Int

Prompts = np.ndarray | Array | Sequence[Sequence[int]]


class Generation(NamedTuple):
  """Generated tokens.

  Attributes:
    tokens: ids [B, N]; behind a stop token, more of it.
    lengths: tokens up to and with the first stop token [B], N without one.
  """

  tokens: np.ndarray
  lengths: np.ndarray


class Decoding(NamedTuple):
  """Carry of the decode loop.

  Attributes:
    logits: of the next token [B, S].
    cache: of the model.
    count: tokens made.
    done: sequences that have met their stop token [B].
  """

  logits: Float[Array, 'B S']
  cache: Any
  count: Int[Array, '']
  done: Array


def generate(
  model: LanguageModel,
  params: Any,
  prompt_tokens: Prompts,
  max_new_tokens: int,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
  stop_token: int | None = None,
  prefill_chunk: int = 256,
  block: int = 32,
) -> Generation:
  """Continues every prompt by `max_new_tokens` tokens.

  What follows a prompt depends on the prompt, its row in the batch and the seed; not on the length
  of the others, and up to rounding not on `prefill_chunk` and `block`.

  Args:
    model: the language model.
    params: its parameters.
    prompt_tokens: ids [B, T], or one sequence of ids a prompt, of any lengths >= 1.
    max_new_tokens: tokens to make, N.
    temperature: divides the logits; 0 takes the most probable token.
    top_k: sample from the k most probable tokens only. None: from all.
    top_p: sample from the most probable tokens that together reach this probability. None: all.
    seed: of the random numbers.
    stop_token: ends a sequence. None: nothing does.
    prefill_chunk: prompt tokens in one call of the model.
    block: tokens between two looks at whether all sequences are done.

  Returns:
    Generation.

  Raises:
    ValueError: an argument out of its range, an empty prompt, an id outside the vocabulary.
  """
  blocks = stream(
    model, params, prompt_tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
    seed=seed, stop_token=stop_token, prefill_chunk=prefill_chunk, block=block,
  )  # fmt: skip
  tokens_BN = np.concatenate(list(blocks), axis=1)
  missing = max_new_tokens - tokens_BN.shape[1]
  if missing:  # all sequences are done
    tokens_BN = np.pad(tokens_BN, ((0, 0), (0, missing)), constant_values=stop_token)
  stopped_BN = np.zeros(tokens_BN.shape, bool) if stop_token is None else tokens_BN == stop_token
  first_B = np.argmax(stopped_BN, axis=1) + 1
  return Generation(tokens_BN, np.where(stopped_BN.any(axis=1), first_B, max_new_tokens))


def stream(
  model: LanguageModel,
  params: Any,
  prompt_tokens: Prompts,
  max_new_tokens: int,
  *,
  temperature: float = 1.0,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
  stop_token: int | None = None,
  prefill_chunk: int = 256,
  block: int = 32,
) -> Iterator[np.ndarray]:
  """As `generate`, but yields the tokens [B, <= block] as they are made; ends when all are done."""
  vocabulary = model.config.vocab_size
  prompts = check_ids('prompt_tokens', prompt_tokens, vocabulary)
  if not prompts:
    raise ValueError('prompt_tokens is empty; expected at least one prompt')
  _check_sampling(temperature, top_k, top_p, vocabulary)
  for name, value in (
    ('max_new_tokens', max_new_tokens), ('prefill_chunk', prefill_chunk), ('block', block)
  ):  # fmt: skip
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      raise ValueError(f'{name} is {value!r}; expected an int >= 1')
  if stop_token is not None and not 0 <= stop_token < vocabulary:
    raise ValueError(f'stop_token is {stop_token}; expected None or an id in [0, {vocabulary})')

  def blocks():
    logits_BS, cache = prefill(model, params, prompts, max_new_tokens + block, chunk=prefill_chunk)
    state = Decoding(logits_BS, cache, jnp.int32(0), jnp.zeros(len(prompts), bool))
    for start in range(0, max_new_tokens, block):
      tokens_BN, state = decode(
        model, params, state, jax.random.key(seed), jnp.float32(temperature),
        None if top_p is None else jnp.float32(top_p), greedy=temperature == 0, top_k=top_k,
        stop_token=stop_token, steps=block,
      )  # fmt: skip
      yield np.asarray(tokens_BN)[:, : max_new_tokens - start]
      if stop_token is not None and bool(state.done.all()):
        return

  return blocks()  # Not a generator itself: arguments are checked when it is called.


def prefill(
  model: LanguageModel,
  params: Any,
  prompts: Sequence[Sequence[int]],
  room: int = 0,
  *,
  chunk: int = 256,
) -> tuple[Float[Array, 'B S'], tuple]:
  """Reads prompts of any lengths.

  Args:
    model: the language model.
    params: its parameters.
    prompts: ids, one non-empty sequence a prompt.
    room: tokens that the cache must hold beyond the prompts, for attention layers.
    chunk: tokens of one call of the model; fewer when all prompts are shorter.

  Returns:
    Logits [B, S] of the token that follows each prompt, and the cache.
  """
  longest = max(len(prompt) for prompt in prompts)
  chunk = min(chunk, next_power_of_two(longest))
  length = -(-longest // chunk) * chunk
  tokens_BT = np.zeros((len(prompts), length), np.int32)
  segments_BT = np.zeros_like(tokens_BT)
  for row, prompt in enumerate(prompts):
    tokens_BT[row, length - len(prompt) :] = prompt
    segments_BT[row, length - len(prompt) :] = 1
  cache = model.init_cache(len(prompts), next_power_of_two(length + room))
  for start in range(0, length, chunk):
    now = slice(start, start + chunk)
    logits_BS, cache = _read(model, params, tokens_BT[:, now], segments_BT[:, now], cache)
  return logits_BS, cache


def filter_logits(
  logits: Float[Array, 'B S'], top_k: int | None = None, top_p: float | Array | None = None
) -> Float[Array, 'B S']:
  """Logits with -inf for the tokens that are not to be sampled; ties with the last kept one stay.

  Args:
    logits: unnormalised log probabilities.
    top_k: how many of the most probable tokens to keep. None: all.
    top_p: keep the fewest of the most probable tokens, of those left, whose probabilities reach
      top_p together; at least one. None: all.
  """
  if top_k is not None:
    least_B1 = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < least_B1, -jnp.inf, logits)
  if top_p is not None:
    sorted_BS = jnp.sort(logits, axis=-1, descending=True)
    probability_BS = jax.nn.softmax(sorted_BS, axis=-1)
    before_BS = jnp.cumsum(probability_BS, axis=-1) - probability_BS
    kept_BS = (before_BS < top_p).at[:, 0].set(True)
    least_B1 = jnp.min(jnp.where(kept_BS, sorted_BS, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least_B1, -jnp.inf, logits)
  return logits


def check_ids(name: str, sequences: Prompts, vocab_size: int) -> list[np.ndarray]:
  """The sequences as arrays.

  Raises:
    ValueError: one of them is empty, not of integers, or has an id outside the vocabulary; `name`
      is what the message calls them.
  """
  rows = [np.asarray(row) for row in sequences]
  for i, row in enumerate(rows):
    if row.ndim != 1 or not row.size or not np.issubdtype(row.dtype, np.integer):
      raise ValueError(
        f'{name}[{i}] has shape {row.shape} and dtype {row.dtype}; '
        'expected a non-empty sequence of integer ids'
      )
    if row.min() < 0 or row.max() >= vocab_size:
      raise ValueError(
        f'{name}[{i}] holds ids from {row.min()} to {row.max()}; '
        f'expected ids in [0, {vocab_size})'
      )
  return rows


def next_power_of_two(n: int) -> int:
  """The smallest power of two that is not less than n >= 1: lengths in few shapes."""
  return 1 << (n - 1).bit_length()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _read(model, params, tokens_BT, segments_BT, cache):
  return model.apply({'params': params}, tokens_BT, segments_BT, cache, method='next_logits')


@functools.partial(
  jax.jit,
  static_argnames=('model', 'greedy', 'top_k', 'stop_token', 'steps'),
  donate_argnames='state',
)
def decode(
  model, params, state, key, temperature, top_p, *, greedy, top_k, stop_token, steps
):  # fmt: skip
  """Makes `steps` tokens [B, steps]; returns them and the new carry; the old one is used up."""
  row_keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(state.done)))

  def pick(state):
    if greedy:
      return jnp.argmax(state.logits, axis=-1)
    logits_BS = filter_logits(state.logits / temperature, top_k, top_p)
    keys_B = jax.vmap(lambda k: jax.random.fold_in(k, state.count))(row_keys_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BS)

  def step(state, _):
    token_B = pick(state).astype(jnp.int32)
    done_B = state.done
    if stop_token is not None:
      token_B = jnp.where(done_B, stop_token, token_B)
      done_B |= token_B == stop_token
    logits_BS, cache = model.apply(
      {'params': params}, token_B[:, None], None, state.cache, method='next_logits'
    )
    return Decoding(logits_BS, cache, state.count + 1, done_B), token_B

  state, tokens_NB = jax.lax.scan(step, state, None, length=steps)
  return tokens_NB.T, state


def _check_sampling(temperature, top_k, top_p, vocabulary):
  if not 0 <= temperature < float('inf'):
    raise ValueError(f'temperature is {temperature}; expected a number >= 0')
  if top_k is not None and (not isinstance(top_k, int) or not 1 <= top_k <= vocabulary):
    raise ValueError(f'top_k is {top_k!r}; expected None or an int in [1, {vocabulary}]')
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f'top_p is {top_p}; expected None or a number in (0, 1]')
