"""The tokenised corpus: all documents in one flat array, in memory or verified on disk."""

import dataclasses
import hashlib
import io
import json
import logging
import pathlib
import shutil
import uuid
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int, UInt, UInt8

from rla_jax.data.sources import DataError, Document
from rla_jax.data.split import DIGEST_BYTES, digest
from rla_jax.data.tokenizer import Tokenizer

STORE_VERSION = 1
_BATCH_BYTES = 1 << 22
_FILES = ('tokens.bin', 'documents.npz')


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenStore:
  """All documents, one after the other: bos, the text's tokens, eos.

  Attributes:
    tokens: uint16 or uint32 [M].
    offsets: int64 [N + 1]; document n is tokens[offsets[n]:offsets[n + 1]].
    document_bytes: int64 [N], UTF-8 bytes of the texts.
    digests: uint8 [N, 16], of the texts.
    held_out: bool [N], documents that were held out when they were read.
    sha256: of tokens, which bos and eos cut into documents.
  """

  tokens: UInt[np.ndarray, 'M']
  offsets: Int[np.ndarray, 'N1']
  document_bytes: Int[np.ndarray, 'N']
  digests: UInt8[np.ndarray, 'N 16']
  held_out: Bool[np.ndarray, 'N']
  sha256: str


def build(documents: Iterable[Document], tokenizer: Tokenizer) -> TokenStore:
  """Tokenises documents into memory.

  Raises:
    DataError: a document is not UTF-8 and the tokenizer needs it to be.
  """
  sink = io.BytesIO()
  index = _tokenise(documents, tokenizer, sink)
  tokens = np.frombuffer(sink.getbuffer(), _dtype(tokenizer))
  return TokenStore(tokens, **index, sha256=hashlib.sha256(tokens).hexdigest())


def build_or_load(
  documents: Iterable[Document], tokenizer: Tokenizer, cache_dir: str, key: str
) -> TokenStore:
  """`build` by way of a folder: cached under `key`, and mapped from disk.

  Sizes and SHA-256 of what is found are verified; a damaged entry is reported and built again.

  Raises:
    DataError: as `build`, or the folder cannot be written.
  """
  entry = pathlib.Path(cache_dir).expanduser() / key
  if entry.is_dir():
    damage = _damage(entry)
    if damage is None:
      return _load(entry, tokenizer)
    logging.getLogger(__name__).warning('%s: %s; tokenising again', entry, damage)
  try:
    entry.parent.mkdir(parents=True, exist_ok=True)
    draft = entry.parent / f'.{key[:16]}-{uuid.uuid4().hex}'
    draft.mkdir()
    try:
      _write(draft, documents, tokenizer)
      _publish(draft, entry)
    finally:
      shutil.rmtree(draft, ignore_errors=True)
  except OSError as error:
    raise DataError(f'cannot write cache_dir {cache_dir!r}: {error.strerror}') from error
  return _load(entry, tokenizer)


def _tokenise(
  documents: Iterable[Document], tokenizer: Tokenizer, sink
) -> dict[str, np.ndarray]:
  """Writes all tokens to the sink and returns the other arrays of a TokenStore."""
  lengths, sizes, digests, held_out = [], [], [], []
  dtype = _dtype(tokenizer)
  bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
  for batch in _batches(documents):
    for document, ids in zip(batch, _encode(batch, tokenizer), strict=True):
      sink.write(np.concatenate((bos, ids.astype(dtype), eos)).data)
      lengths.append(ids.size + 2)
      sizes.append(len(document.text))
      digests.append(digest(document.text))
      held_out.append(document.held_out)
  return {
    'offsets': np.concatenate(([0], np.cumsum(np.array(lengths, np.int64)))),
    'document_bytes': np.array(sizes, np.int64),
    'digests': np.frombuffer(b''.join(digests), np.uint8).reshape(-1, DIGEST_BYTES),
    'held_out': np.array(held_out, bool),
  }


def _batches(documents: Iterable[Document]):
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document.text)
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _encode(batch: list[Document], tokenizer: Tokenizer) -> list[np.ndarray]:
  try:
    return tokenizer.encode_batch([document.text for document in batch])
  except UnicodeDecodeError:
    for document in batch:
      try:
        document.text.decode('utf-8')
      except UnicodeDecodeError as error:
        raise DataError(
          f"{document.source} is not UTF-8 (byte {error.start} of the document: {error.reason}); "
          "tokenizer 'byte' takes any bytes"
        ) from error
    raise


def _dtype(tokenizer: Tokenizer) -> np.dtype:
  return np.dtype('<u2' if tokenizer.vocab_size <= 1 << 16 else '<u4')


def _write(draft: pathlib.Path, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
  with (draft / 'tokens.bin').open('wb') as sink:
    index = _tokenise(documents, tokenizer, sink)
  np.savez(draft / 'documents.npz', **index)
  (draft / 'manifest.json').write_text(json.dumps({name: _seal(draft / name) for name in _FILES}))


def _seal(path: pathlib.Path) -> dict[str, int | str]:
  with path.open('rb') as stream:
    return {'sha256': hashlib.file_digest(stream, 'sha256').hexdigest(), 'size': stream.tell()}


def _damage(entry: pathlib.Path) -> str | None:
  try:
    manifest = json.loads((entry / 'manifest.json').read_text())
    for name in _FILES:
      size = (entry / name).stat().st_size
      if size != manifest[name]['size']:
        return f"{name} has {size} bytes, its manifest says {manifest[name]['size']}"
      if _seal(entry / name) != manifest[name]:
        return f'{name} does not have the SHA-256 of its manifest'
  except (OSError, ValueError, KeyError, TypeError) as error:
    return f'unreadable: {error!r}'
  return None


def _publish(draft: pathlib.Path, entry: pathlib.Path) -> None:
  if entry.is_dir() and _damage(entry) is not None:
    shutil.rmtree(entry)
  try:
    draft.rename(entry)
  except OSError:
    # Several processes may build one entry at once: the first complete folder stays.
    if not entry.is_dir():
      raise


def _load(entry: pathlib.Path, tokenizer: Tokenizer) -> TokenStore:
  with np.load(entry / 'documents.npz') as archive:
    index = dict(archive)
  # An empty file cannot be mapped; no documents are the caller's error to report.
  empty = not (entry / 'tokens.bin').stat().st_size
  dtype = _dtype(tokenizer)
  tokens = np.zeros(0, dtype) if empty else np.memmap(entry / 'tokens.bin', dtype, mode='r')
  sha256 = json.loads((entry / 'manifest.json').read_text())['tokens.bin']['sha256']
  return TokenStore(tokens, **index, sha256=sha256)
