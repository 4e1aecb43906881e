"""From a config to tokenised documents, split into training and validation."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int, UInt

from rla_jax.data import sources, split, store
from rla_jax.data.config import DataConfig
from rla_jax.data.sources import DataError, Document, SourceFile
from rla_jax.data.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenSet:
  """Some documents of a flat token array.

  Attributes:
    tokens: uint16 or uint32 [M], of these documents and others.
    starts: int64 [N]; document n is tokens[starts[n]:starts[n] + lengths[n]], bos and eos included.
    lengths: int64 [N].
    document_bytes: int64 [N], UTF-8 bytes.
  """

  tokens: UInt[np.ndarray, 'M']
  starts: Int[np.ndarray, 'N']
  lengths: Int[np.ndarray, 'N']
  document_bytes: Int[np.ndarray, 'N']

  @property
  def num_documents(self) -> int:
    """N."""
    return self.starts.size

  @property
  def num_tokens(self) -> int:
    """Tokens that are predicted: all but each document's bos."""
    return int(self.lengths.sum()) - self.num_documents

  @property
  def num_bytes(self) -> int:
    """UTF-8 bytes of the texts, the denominator of bits per byte."""
    return int(self.document_bytes.sum())

  def __repr__(self) -> str:
    """Sizes, not arrays."""
    return (
      f'TokenSet({self.num_documents:,} documents, {self.num_tokens:,} tokens, '
      f'{self.num_bytes:,} bytes)'
    )

  def select(self, index: Bool[np.ndarray, 'N'] | Int[np.ndarray, 'n']) -> 'TokenSet':
    """The documents of a mask or of indices [n], in their order."""
    return TokenSet(
      self.tokens, self.starts[index], self.lengths[index], self.document_bytes[index]
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corpus:
  """Tokenised documents, split.

  Attributes:
    train: documents to learn from, in the order of the files.
    validation: held-out documents, in an order that their content decides; none is in `train`.
    tokenizer: what tokenised them.
    files: the files read, those of `validation_path` last.
    sha256: of all tokens.
  """

  train: TokenSet
  validation: TokenSet
  tokenizer: Tokenizer
  files: tuple[SourceFile, ...]
  sha256: str

  def __repr__(self) -> str:
    """Sizes, not arrays."""
    return (
      f'Corpus(train={self.train}, validation={self.validation}, '
      f'tokenizer={self.tokenizer.name}, {len(self.files):,} files)'
    )

  @classmethod
  def load(cls, config: DataConfig) -> 'Corpus':
    """Reads, tokenises and splits what the config names, or takes it from its cache_dir.

    Everything is read here, once, and file hashes are taken of what is on disk now.

    Raises:
      DataError: a source or tokenizer is missing or damaged, or a side of the split is empty.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    files = sources.hash_files(sources.find_files(config.path))
    tokenised = _tokenised(files, tokenizer, config, cut=config.validation_path is None)
    everything = _token_set(tokenised)
    if config.validation_path is None:
      validation = everything
      train_index, validation_index = _split_one(tokenised.digests, tokenised.held_out, config)
      sha256 = tokenised.sha256
    else:
      validation_files = sources.hash_files(sources.find_files(config.validation_path))
      files += validation_files
      held_out = _tokenised(validation_files, tokenizer, config, cut=False)
      validation = _token_set(held_out)
      train_index, validation_index = _split_two(tokenised.digests, held_out.digests, config)
      sha256 = hashlib.sha256(f'{tokenised.sha256} {held_out.sha256}'.encode()).hexdigest()
    return cls(
      everything.select(train_index),
      validation.select(validation_index),
      tokenizer,
      tuple(files),
      sha256,
    )


def load_documents(config: DataConfig) -> tuple[list[Document], list[Document]]:
  """The texts behind `Corpus.load`: training and held-out documents in the same order.

  Raises:
    DataError: as `Corpus.load`.
  """
  documents = _documents(sources.find_files(config.path), config, config.validation_path is None)
  if config.validation_path is None:
    validation = documents
    held_out = np.array([document.held_out for document in documents], bool)
    train_index, validation_index = _split_one(_digests(documents), held_out, config)
  else:
    validation = _documents(sources.find_files(config.validation_path), config, cut=False)
    train_index, validation_index = _split_two(
      _digests(documents), _digests(validation), config
    )
  return [documents[n] for n in train_index], [validation[n] for n in validation_index]


def _read(files, config: DataConfig, cut: bool) -> Iterator[Document]:
  documents = sources.read_documents(files, config)
  return split.cut_lone_document(documents, config.validation_fraction) if cut else documents


def _documents(paths, config: DataConfig, cut: bool) -> list[Document]:
  return list(_read(sources.hash_files(paths), config, cut))


def _tokenised(
  files: list[SourceFile], tokenizer: Tokenizer, config: DataConfig, cut: bool
) -> store.TokenStore:
  documents = _read(files, config, cut)
  if config.cache_dir is None:
    return store.build(documents, tokenizer)
  settings = [
    store.STORE_VERSION,
    tokenizer.fingerprint,
    config.format,
    config.text_field,
    config.document_separator,
    config.validation_fraction if cut else None,
    # The suffix decides how a file is read.
    [(file.path.suffixes[-2:], file.sha256) for file in files],
  ]
  key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
  return store.build_or_load(documents, tokenizer, config.cache_dir, key)


def _token_set(tokenised: store.TokenStore) -> TokenSet:
  offsets = tokenised.offsets
  return TokenSet(tokenised.tokens, offsets[:-1], np.diff(offsets), tokenised.document_bytes)


def _digests(documents: list[Document]) -> np.ndarray:
  joined = b''.join(split.digest(document.text) for document in documents)
  return np.frombuffer(joined, np.uint8).reshape(-1, split.DIGEST_BYTES)


def _split_one(
  digests: np.ndarray, held_out_N: np.ndarray, config: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Indices of both sides of one set of documents, held out by content if not so far."""
  _expect_documents(digests, 'path', config.path)
  if not held_out_N.any():
    held_out_N = split.split(digests, config.validation_fraction, config.validation_seed)
  return np.flatnonzero(~held_out_N), _by_content(digests, held_out_N, config)


def _split_two(
  digests: np.ndarray, held_out: np.ndarray, config: DataConfig
) -> tuple[np.ndarray, np.ndarray]:
  """Indices into documents and held-out documents; what is held out leaves the training set."""
  _expect_documents(digests, 'path', config.path)
  _expect_documents(held_out, 'validation_path', config.validation_path)
  contents = {row.tobytes() for row in held_out}
  train_N = np.array([row.tobytes() not in contents for row in digests])
  if not train_N.any():
    raise DataError(f'every document of path is also in validation_path {config.validation_path!r}')
  if not train_N.all():
    logging.getLogger(__name__).warning(
      '%d of %d training documents are left out: they are also in validation_path',
      (~train_N).sum(), train_N.size,
    )
  return np.flatnonzero(train_N), _by_content(held_out, np.ones(len(held_out), bool), config)


def _by_content(digests: np.ndarray, chosen_N: np.ndarray, config: DataConfig) -> np.ndarray:
  # Any beginning of this order is a fair sample, so that a short evaluation can stop early.
  index = np.flatnonzero(chosen_N)
  return index[np.argsort(split.ranks(digests[index], config.validation_seed), kind='stable')]


def _expect_documents(digests: np.ndarray, name: str, path: str | None) -> None:
  if not len(digests):
    raise DataError(f'the corpus is empty: {name} {path!r} holds no text')
