"""Small corpora for the tests of the data pipeline."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np

from rla_jax.data import Document, TokenSet

PACK = {'': bytes, '.gz': gzip.compress, '.xz': lzma.compress}


def jsonl(texts, field: str = 'text') -> bytes:
  return b''.join(json.dumps({'id': n, field: t}).encode() + b'\n' for n, t in enumerate(texts))


def write(path: Path, content: bytes) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(PACK.get(path.suffix, bytes)(content))
  return path


def words(num_documents: int, seed: int = 0) -> list[str]:
  """Documents of 1 to 60 words, some of them not ASCII, no two equal."""
  rng = np.random.default_rng(seed)
  vocabulary = ['state', 'decay', 'naïve', 'größe', '状態', 'residual', 'a', 'of', '\n', '🙂']
  return [
    f'{n}: ' + ' '.join(rng.choice(vocabulary, rng.integers(1, 61))) for n in range(num_documents)
  ]


def corpus_folder(folder: Path, num_documents: int = 60) -> Path:
  """A folder with one jsonl file of `words`."""
  write(folder / 'corpus.jsonl.xz', jsonl(words(num_documents)))
  return folder


def numbered(lengths) -> TokenSet:
  """Documents whose tokens are their positions in the flat array, so that each is recognisable."""
  lengths = np.array(lengths, np.int64)
  starts = np.cumsum(lengths) - lengths
  tokens = np.arange(lengths.sum(), dtype=np.uint32)
  return TokenSet(tokens, starts, lengths, document_bytes=lengths - 2)


def documents(texts) -> list[Document]:
  return [Document(t if isinstance(t, bytes) else t.encode(), f'{n}') for n, t in enumerate(texts)]
