"""The held-out split: by whole documents, a function of their content and a seed."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, UInt8, UInt64

from rla_jax.data.sources import DataError, Document

DIGEST_BYTES = 16


def digest(text: bytes) -> bytes:
  """What identifies a document's content: 16 bytes of BLAKE2b."""
  return hashlib.blake2b(text, digest_size=DIGEST_BYTES).digest()


def ranks(digests: UInt8[np.ndarray, 'N 16'], seed: int) -> UInt64[np.ndarray, 'N']:
  """A uniform number per content.

  Args:
    digests: uint8 [N, 16].
    seed: another seed gives independent numbers.

  Returns:
    uint64 [N]; equal contents have equal numbers, whatever documents lie around them.
  """
  key = seed.to_bytes(8, 'little')
  hashes = [hashlib.blake2b(d.tobytes(), key=key, digest_size=8).digest() for d in digests]
  return np.frombuffer(b''.join(hashes), '<u8')


def split(
  digests: UInt8[np.ndarray, 'N 16'], fraction: float, seed: int
) -> Bool[np.ndarray, 'N']:
  """Which documents are held out.

  A document is held out if its rank, as a number in [0, 1), lies below the fraction: documents that
  are added or removed elsewhere do not move it, and copies of one text fall on the same side. So
  that neither side is empty, the lowest rank is held out and the highest is not, always.

  Args:
    digests: uint8 [N, 16], with at least two different rows.
    fraction: expected fraction of the documents, in (0, 1).
    seed: seed of the split.

  Returns:
    bool [N].

  Raises:
    DataError: all documents are the same.
  """
  rank_N = ranks(digests, seed)
  if rank_N.min() == rank_N.max():
    raise DataError(
      f'all {len(rank_N)} documents are copies of one text: nothing can be held out; '
      'give validation_path'
    )
  held_out_N = rank_N.astype(np.float64) / 2.0**64 < fraction
  held_out_N[rank_N == rank_N.min()] = True
  held_out_N[rank_N == rank_N.max()] = False
  return held_out_N


def cut_lone_document(documents: Iterable[Document], fraction: float) -> Iterator[Document]:
  """Cuts a corpus of a single document in two and holds its end out.

  The cut is the last line break before the last `fraction` of the bytes or, in a text of one line,
  the nearest character boundary. Corpora of more documents pass unchanged.

  Raises:
    DataError: the document is too short to be cut.
  """
  documents = iter(documents)
  first = next(documents, None)
  if first is None:
    return
  second = next(documents, None)
  if second is not None:
    yield first
    yield second
    yield from documents
    return
  text = first.text
  cut = int(len(text) * (1.0 - fraction))
  line_break = text.rfind(b'\n', 0, cut) + 1
  if line_break:
    cut = line_break
  else:
    while cut and text[cut] & 0xC0 == 0x80:  # The bytes of one UTF-8 character stay together.
      cut -= 1
  if not cut:
    raise DataError(f'{first.source} is the only document and too short to hold out a part of it')
  yield Document(text[:cut], first.source)
  yield Document(text[cut:], f'{first.source} (last {len(text) - cut} bytes)', held_out=True)
