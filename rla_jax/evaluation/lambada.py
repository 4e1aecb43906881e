"""LAMBADA: the last word of a passage, which only its wider context tells.

The continuation is a space and the last word; its context is all before them.

Reference:
  Paperno et al.: The LAMBADA dataset, arXiv:1606.06031; the texts as OpenAI prepared them.
"""

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from rla_jax.data import Tokenizer
from rla_jax.evaluation import records
from rla_jax.evaluation.likelihood import encode_pair, log_likelihoods
from rla_jax.evaluation.scorer import Scorer

NAMES = ('lambada_openai', 'lambada')


@dataclasses.dataclass(frozen=True)
class Lambada:
  """Scores over passages.

  Attributes:
    perplexity: exp of the mean -ln p(last word).
    accuracy: share of passages whose last word is what greedy decoding yields.
    accuracy_stderr: its standard error.
    samples: passages.
  """

  perplexity: float
  accuracy: float
  accuracy_stderr: float
  samples: int


def read(path: str | os.PathLike) -> list[str]:
  """The passages of a file with the column `text`.

  Raises:
    DataError: the file is missing, damaged, empty, or has other columns.
  """
  return [record['text'] for record in records.read(path, ['text'])]


def last_word(text: str) -> tuple[str, str]:
  """Context and continuation: 'a b c' -> ('a b', ' c')."""
  context, _, word = text.rpartition(' ')
  return context, f' {word}'


def evaluate(
  scorer: Scorer, tokenizer: Tokenizer, texts: Sequence[str], description: str | None = None
) -> Lambada:
  """Scores passages; see `Lambada`."""
  pairs = [encode_pair(tokenizer, *last_word(text)) for text in texts]
  found = log_likelihoods(scorer, tokenizer.bos_id, pairs, description)
  accuracy = float(np.mean([x.greedy for x in found]))
  mean = float(np.mean([x.log_likelihood for x in found]))
  return Lambada(
    perplexity=math.exp(-mean) if mean > -700 else math.inf,
    accuracy=accuracy,
    accuracy_stderr=math.sqrt(accuracy * (1 - accuracy) / max(1, len(found) - 1)),
    samples=len(found),
  )
