"""Log likelihoods of token sequences of any lengths, in few compiled shapes.

Sequences are sorted by length and padded to the next of a few lengths; a batch holds a constant
number of tokens. What is longer than a chunk runs chunk by chunk, the state carried: the same
numbers, and memory that does not grow with the length (attention layers keep what they have read).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from rla_jax.generation import check_ids, next_power_of_two
from rla_jax.models import LanguageModel
from rla_jax.shapes import Int

SHORTEST = 32  # tokens of the smallest shape
_LOGITS = 2**29  # numbers that the logits of a batch may have together


class Scores(NamedTuple):
  """What the model says about the tokens 1 .. n of a sequence of n + 1 tokens.

  Attributes:
    nll: -ln p(token | those before it) [n], in nats, float32.
    greedy: whether the token is a most probable one [n].
  """

  nll: np.ndarray
  greedy: np.ndarray


class Scorer:
  """Scores token sequences under a model.

  Attributes:
    model: the language model.
    params: its parameters.
    chunk: tokens of the longest shape; 1 runs every token through the recurrent step.
    batch_tokens: tokens of a batch, padding included.
    shapes: (rows, tokens, whether state is carried) of all that was compiled.
  """

  def __init__(
    self, model: LanguageModel, params: Any, *, chunk: int = 2048, batch_tokens: int = 16384
  ):
    """Scores with a model.

    Args:
      model: the language model.
      params: its parameters.
      chunk: longest piece of a sequence in one call of the model.
      batch_tokens: tokens of one call; fewer where the logits would take more than 2 GiB.

    Raises:
      ValueError: an argument less than 1.
    """
    for name, value in (('chunk', chunk), ('batch_tokens', batch_tokens)):
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'{name} is {value!r}; expected an int >= 1')
    self.model, self.params, self.chunk = model, params, chunk
    self.batch_tokens = max(chunk, min(batch_tokens, _LOGITS // model.config.vocab_size))
    self.shapes: set[tuple[int, int, bool]] = set()
    lengths = SHORTEST * 2 ** np.arange(32)
    self._lengths = [int(n) for n in lengths if n < chunk] + [chunk]

  def score(
    self, sequences: Sequence[Int[np.ndarray, ' n1']], description: str | None = None
  ) -> list[Scores]:
    """Scores every token but the first of every sequence.

    Args:
      sequences: ids [n + 1] each, n >= 0; the first is context only.
      description: of the progress bar, which counts tokens; None: no bar.

    Returns:
      One record a sequence, in their order.

    Raises:
      ValueError: a sequence without a token, or an id outside the vocabulary.
    """
    sequences = check_ids('sequences', sequences, self.model.config.vocab_size)
    found: list[Scores | None] = [None] * len(sequences)
    total = sum(len(s) - 1 for s in sequences)
    hidden = None if description is not None else True
    with tqdm(total=total, desc=description, unit='token', unit_scale=True, disable=hidden) as bar:
      for index, length in self._batches(sequences):
        batch = [sequences[i] for i in index]
        for i, scores in zip(index, self._score_batch(batch, length), strict=True):
          found[i] = scores
          bar.update(len(scores.nll))
    return found

  def _batches(self, sequences):
    """Batches of indices, longest sequences first, and the shape's length; None: in chunks."""
    by_length: dict[int | None, list[int]] = {}
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    for i in order:
      n = len(sequences[i]) - 1
      length = next((size for size in self._lengths if n <= size), None)
      by_length.setdefault(length, []).append(i)
    for length, index in by_length.items():
      rows = self._rows(length or self.chunk)
      for start in range(0, len(index), rows):
        yield index[start : start + rows], length

  def _rows(self, length):
    return max(1, self.batch_tokens // length)

  def _score_batch(self, batch: list[np.ndarray], length: int | None) -> list[Scores]:
    rows = self._rows(length or self.chunk)
    longest = max(len(s) for s in batch) - 1
    padded = length or -(-longest // self.chunk) * self.chunk
    tokens_BT = np.zeros((rows, padded + 1), np.int32)  # what follows a sequence cannot reach it
    for row, s in enumerate(batch):
      tokens_BT[row, : len(s)] = s
    self.shapes.add((rows, length or self.chunk, length is None))
    if length is not None:
      pieces = [_score(self.model, self.params, tokens_BT)]
    else:
      pieces, cache = [], self.model.init_cache(rows, next_power_of_two(padded))
      for start in range(0, padded, self.chunk):
        now = tokens_BT[:, start : start + self.chunk + 1]
        piece, cache = _score_chunk(self.model, self.params, now, cache)
        pieces.append(piece)
    nll_BT, greedy_BT = (np.concatenate(x, axis=1) for x in zip(*pieces, strict=True))
    return [
      Scores(nll_BT[row, : len(s) - 1], greedy_BT[row, : len(s) - 1])
      for row, s in enumerate(batch)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _score(model, params, tokens_BT):
  return model.apply({'params': params}, tokens_BT[:, :-1], tokens_BT[:, 1:], method='score')


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _score_chunk(model, params, tokens_BT, cache):
  return model.apply(
    {'params': params}, tokens_BT[:, :-1], tokens_BT[:, 1:], cache=cache, method='score'
  )
