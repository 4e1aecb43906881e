"""Perplexity of documents: bits per byte, token and word perplexity, loss by position.

A document is its text behind the tokenizer's bos; what is scored is the text, each token once, and
not the eos behind it. By default a document is read whole, its state carried from chunk to chunk.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from rla_jax.data import DataError, Tokenizer
from rla_jax.evaluation.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class TextLoss:
  """Sums over documents, and the measures made of them.

  Attributes:
    nats: -ln p of all tokens.
    tokens: their number.
    words: number of words, by the definition of the suite.
    bytes: UTF-8 bytes, likewise.
    documents: number of documents.
    positions: mean loss by position in the document.
  """

  nats: float
  tokens: int
  words: int
  bytes: int
  documents: int
  positions: 'PositionLoss'

  @property
  def loss(self) -> float:
    """Nats a token."""
    return self.nats / self.tokens

  @property
  def token_perplexity(self) -> float:
    """exp(nats / tokens)."""
    return _exp(self.loss)

  @property
  def word_perplexity(self) -> float:
    """exp(nats / words): does not depend on the tokenizer."""
    return _exp(self.nats / self.words)

  @property
  def bits_per_byte(self) -> float:
    """Bits a byte: does not depend on the tokenizer."""
    return self.nats / math.log(2) / self.bytes


@dataclasses.dataclass(frozen=True)
class PositionLoss:
  """Loss of the tokens at positions edges[i] <= p < edges[i + 1]; the first token is at 0.

  Attributes:
    edges: int [n + 1], rising; four bins an octave.
    nats: sum of the losses in a bin [n].
    tokens: their number [n].
  """

  edges: np.ndarray
  nats: np.ndarray
  tokens: np.ndarray

  def rows(self) -> list[dict[str, float]]:
    """One record a bin that has tokens: first and last position, tokens, loss in nats a token."""
    return [
      {'first': int(a), 'last': int(b) - 1, 'tokens': int(n), 'loss': float(s / n)}
      for a, b, s, n in zip(self.edges[:-1], self.edges[1:], self.nats, self.tokens, strict=True)
      if n
    ]


@dataclasses.dataclass(frozen=True)
class Text:
  """A document to evaluate.

  Attributes:
    text: what the model reads.
    words: words that it counts as; None: its runs of characters that are no white space.
    bytes: bytes that it counts as; None: those of its UTF-8 form.
  """

  text: str | bytes
  words: int | None = None
  bytes: int | None = None


def text_loss(
  scorer: Scorer,
  tokenizer: Tokenizer,
  documents: Sequence[Text],
  *,
  window: int | None = None,
  stride: int | None = None,
  description: str | None = None,
) -> TextLoss:
  """Loss on documents.

  Args:
    scorer: of the model.
    tokenizer: the model's.
    documents: at least one; those without a token do not count.
    window: the model sees only windows of so many tokens of a document, each from nothing. None:
      whole documents.
    stride: tokens from the start of a window to that of the next. Every token is scored once, in
      the first window that holds it: with stride < window, behind at least window - stride tokens.
      None: window.
    description: of the progress bar; None: none.

  Raises:
    DataError: no document has a token.
    ValueError: a stride without a window, or larger.
  """
  if stride is not None and (window is None or not 1 <= stride <= window):
    raise ValueError(f'stride is {stride}; expected 1 to window, which is {window}')
  if window is not None and window < 1:
    raise ValueError(f'window is {window}; expected at least 1')
  encoded = tokenizer.encode_batch([d.text for d in documents])
  kept = [(d, ids) for d, ids in zip(documents, encoded, strict=True) if len(ids)]
  if not kept:
    raise DataError('there is no text to evaluate: no document has a token')
  pieces = []  # (tokens, how many of the last are scored, position of the first scored)
  for _, ids in kept:
    tokens = np.concatenate(([tokenizer.bos_id], ids)).astype(np.int32)
    pieces += [
      (tokens[start : stop + 1], stop - first, first)
      for start, first, stop in windows(len(ids), window, stride)
    ]
  scores = scorer.score([tokens for tokens, _, _ in pieces], description)

  longest = max(len(ids) for _, ids in kept)
  edges = position_edges(longest)
  nats, count = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, np.int64)
  for (_, scored, first), piece in zip(pieces, scores, strict=True):
    nll = piece.nll[len(piece.nll) - scored :].astype(np.float64)
    bins = np.searchsorted(edges, first + np.arange(scored), side='right') - 1
    nats += np.bincount(bins, nll, len(nats))
    count += np.bincount(bins, minlength=len(nats))
  return TextLoss(
    nats=math.fsum(nats), tokens=int(count.sum()),
    words=sum(_words(d.text) if d.words is None else d.words for d, _ in kept),
    bytes=sum(len(_encoded(d.text)) if d.bytes is None else d.bytes for d, _ in kept),
    documents=len(kept), positions=PositionLoss(edges, nats, count),
  )  # fmt: skip


def windows(
  length: int, window: int | None = None, stride: int | None = None
) -> list[tuple[int, int, int]]:
  """Windows on the inputs 0 .. length - 1, each predicting the token after it.

  Returns:
    (start, first, stop): inputs start .. stop - 1 are read, the predictions of first .. stop - 1
    are scored. Every prediction is scored once.
  """
  window = length if window is None else window
  stride = window if stride is None else stride
  found, first, start = [], 0, 0
  while first < length:
    stop = min(start + window, length)
    found.append((start, first, stop))
    first, start = stop, start + stride
  return found


def position_edges(length: int) -> np.ndarray:
  """Edges of the bins of positions below length: single ones at first, then four an octave."""
  octaves = math.ceil(math.log2(max(length, 2)))
  edges = np.unique(np.round(2.0 ** (np.arange(4 * octaves + 1) / 4)).astype(np.int64))
  return np.concatenate(([0], edges))


def _words(text: str | bytes) -> int:
  text = text if isinstance(text, str) else text.decode('utf-8', errors='replace')
  return len(re.findall(r'\S+', text))


def _encoded(text: str | bytes) -> bytes:
  return text.encode() if isinstance(text, str) else text


def _exp(x: float) -> float:
  return math.exp(x) if x < 700 else math.inf
