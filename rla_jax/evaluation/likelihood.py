"""Log likelihood of a continuation behind a context: what multiple-choice tasks compare.

The model reads bos, the context, the continuation. Context and continuation are tokenised together,
since a tokenizer may join them; white space at the context's end belongs to the continuation.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rla_jax.data import Tokenizer
from rla_jax.evaluation.scorer import Scorer

Pair = tuple[Sequence[int], Sequence[int]]


class Likelihood(NamedTuple):
  """What the model says about a continuation.

  Attributes:
    log_likelihood: ln p(continuation | context).
    greedy: whether each of its tokens is a most probable one, so that greedy decoding yields it.
  """

  log_likelihood: float
  greedy: bool


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
  """Ids of a context (possibly none) and of what follows it, without bos.

  Raises:
    ValueError: the continuation has no token.
  """
  body = context.rstrip()
  continuation = context[len(body) :] + continuation
  whole = tokenizer.encode(body + continuation)
  split = len(tokenizer.encode(body)) if body else 0
  if split >= len(whole):
    raise ValueError(f'the continuation {continuation!r} has no token of its own')
  return whole[:split], whole[split:]


def log_likelihoods(
  scorer: Scorer, bos_id: int, pairs: Sequence[Pair], description: str | None = None
) -> list[Likelihood]:
  """Log likelihood of every continuation.

  Args:
    scorer: of the model.
    bos_id: opens a document; it is put before a context that does not begin with it.
    pairs: ids of context, which may be empty, and continuation; an empty one has likelihood 1.
    description: of the progress bar; None: none.
  """
  sequences = []
  for context, continuation in pairs:
    ids = np.concatenate((np.asarray(context, np.int32), np.asarray(continuation, np.int32)))
    opened = len(context) > 0 and context[0] == bos_id
    sequences.append(ids if opened else np.concatenate(([np.int32(bos_id)], ids)))
  found = []
  for (_, continuation), scores in zip(pairs, scorer.score(sequences, description), strict=True):
    first = len(scores.nll) - len(continuation)
    total = float(scores.nll[first:].sum(dtype=np.float64))
    found.append(Likelihood(-total, bool(scores.greedy[first:].all())))
  return found
