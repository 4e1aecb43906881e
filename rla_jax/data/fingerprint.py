"""What a step number means: everything that decides the data, in a form that can be compared."""

import hashlib
import json

import numpy as np

from rla_jax.data.batches import shuffled_rows
from rla_jax.data.config import DataConfig
from rla_jax.data.corpus import Corpus, TokenSet
from rla_jax.data.packing import PACKING_VERSION
from rla_jax.data.sources import DataError

_PROBE_ROWS = 1000


def fingerprint(config: DataConfig, corpus: Corpus) -> dict[str, str | int]:
  """Describes the pipeline from files to batches; equal fingerprints give equal batches.

  Neither the paths of the files nor the number of processes or threads enter: a corpus may move,
  and a run may continue on other hosts.

  Returns:
    JSON-serialisable entries by name: `files` (SHA-256 over the files' own, in order), `tokenizer`,
    `tokens` (SHA-256 of the tokenised corpus), sizes of the split, seq_len, batch_size, seed, the
    version of packing, and `order`, a probe of the shuffle itself; `digest` is over all others.
  """
  probe = shuffled_rows(_PROBE_ROWS, config.seed)
  entries = {
    'files': _sha256(json.dumps([file.sha256 for file in corpus.files]).encode()),
    'bytes_on_disk': sum(file.size for file in corpus.files),
    'tokenizer': f'{corpus.tokenizer.name} {corpus.tokenizer.fingerprint}',
    'tokens': corpus.sha256,
    'split': _sha256(_documents(corpus.train) + _documents(corpus.validation)),
    'train_documents': corpus.train.num_documents,
    'validation_documents': corpus.validation.num_documents,
    'seq_len': config.seq_len,
    'batch_size': config.batch_size,
    'seed': config.seed,
    'packing_version': PACKING_VERSION,
    'order': _sha256(json.dumps([int(probe[i]) for i in range(8)]).encode()),
  }
  return {**entries, 'digest': _sha256(json.dumps(entries).encode())}


def check_fingerprint(saved: dict[str, str | int], current: dict[str, str | int]) -> None:
  """Refuses to go on with other data than before.

  Args:
    saved: the fingerprint in the checkpoint.
    current: that of the pipeline at hand.

  Raises:
    DataError: they differ; the message lists each entry that does, with both values.
  """
  names = [name for name in {**saved, **current} if name != 'digest']
  lines = [
    f"  {name}: {saved.get(name, 'absent')} in the checkpoint, {current.get(name, 'absent')} now"
    for name in names
    if saved.get(name) != current.get(name)
  ]
  if lines:
    raise DataError('\n'.join(['the data are not those of the checkpoint:', *lines]))


def _documents(documents: TokenSet) -> bytes:
  return np.stack((documents.starts, documents.lengths)).astype('<i8').tobytes()


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()
