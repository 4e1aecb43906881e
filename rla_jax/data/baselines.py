"""Compressors to stand a model's bits per byte beside: unigram, bigram and xz.

Unigram and bigram are over 257 symbols, the bytes and the end of a document, fitted on the training
documents alone; their figures include each document's end, as the model's do. With c for counts and
d(x) for the number of different symbols seen after x:

    p(y)     = (c(y) + 1) / (c() + 257)                 add one
    p(y | x) = (c(x, y) + d(x) p(y)) / (c(x) + d(x))    Witten and Bell (1991)

The context of a document's first byte is the end of a document. xz (preset 9, extreme) gets the
held-out documents joined to one stream and the training documents not at all; its container counts.
"""

import dataclasses
import lzma
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

from rla_jax.data.sources import Document

_SYMBOLS = 257
_END = 256
_BLOCK_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Baselines:
  """Bits per byte of the held-out documents under three compressors, and their size.

  Attributes:
    unigram: smoothed by add one.
    bigram: smoothed by Witten-Bell.
    xz: `xz -9e` of the held-out documents alone.
    num_bytes: UTF-8 bytes of the held-out documents.
  """

  unigram: float
  bigram: float
  xz: float
  num_bytes: int


def measure(train: Iterable[Document], held_out: Sequence[Document]) -> Baselines:
  """Measures the baselines; see the module for their definition.

  Args:
    train: documents to count in.
    held_out: documents to measure on, as `load_documents` returns both.

  Returns:
    Bits per byte.

  Raises:
    ValueError: held_out has no text.
  """
  num_bytes = sum(len(document.text) for document in held_out)
  if not num_bytes:
    raise ValueError('held_out has no text')
  train_counts, counts = bigram_counts(train), bigram_counts(held_out)
  unigram = unigram_probabilities(train_counts)
  bigram = bigram_probabilities(train_counts)
  compressed = lzma.compress(
    b''.join(document.text for document in held_out), preset=9 | lzma.PRESET_EXTREME
  )
  return Baselines(
    unigram=float(-(counts.sum(axis=0) * np.log2(unigram)).sum() / num_bytes),
    bigram=float(-(counts * np.log2(bigram)).sum() / num_bytes),
    xz=8 * len(compressed) / num_bytes,
    num_bytes=num_bytes,
  )


def bigram_counts(documents: Iterable[Document]) -> Int[np.ndarray, '257 257']:
  """How often a symbol follows another: int64 [257, 257], the former first."""
  counts = np.zeros(_SYMBOLS * _SYMBOLS, np.int64)
  for symbols in _symbols(documents):
    counts += np.bincount(symbols[:-1] * _SYMBOLS + symbols[1:], minlength=counts.size)
  return counts.reshape(_SYMBOLS, _SYMBOLS)


def unigram_probabilities(counts: Int[np.ndarray, '257 257']) -> Float[np.ndarray, '257']:
  """p(y), float64 [257], from bigram counts [257, 257]."""
  total = counts.sum(axis=0) + 1.0
  return total / total.sum()


def bigram_probabilities(
  counts: Int[np.ndarray, '257 257'],
) -> Float[np.ndarray, '257 257']:
  """p(y | x), float64 [257 x, 257 y], from bigram counts; p(y) after an x never seen."""
  unigram = np.broadcast_to(unigram_probabilities(counts), counts.shape)
  seen = counts.sum(axis=1, keepdims=True)
  different = (counts > 0).sum(axis=1, keepdims=True)
  smoothed = (counts + different * unigram) / np.maximum(seen + different, 1)
  return np.where(seen > 0, smoothed, unigram)


def _symbols(documents: Iterable[Document]) -> Iterator[np.ndarray]:
  """Blocks of whole documents, int64: each preceded and followed by the end symbol."""
  end = np.array([_END])
  block, size = [end], 0
  for document in documents:
    block += (np.frombuffer(document.text, np.uint8), end)
    size += len(document.text)
    if size >= _BLOCK_BYTES:
      yield np.concatenate(block)
      block, size = [end], 0
  yield np.concatenate(block)
