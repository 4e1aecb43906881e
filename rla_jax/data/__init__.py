"""Text to batches: sources, tokenizers, held-out split, packing, and the order of training.

    config = data.DataConfig(path="my_text/*.jsonl.xz", seq_len=1024, batch_size=32)
    corpus = data.load(config)                   # reads, splits and tokenises; verifies a cache
    for batch in data.train_batches(config, corpus, start_step=step):
      ...                                        # endless; a function of (seed, step) alone
    held_out = data.evaluation_batches(config, corpus)
    for batch in held_out:                       # each held-out token is a target exactly once
      ...                                        # bits per byte: sum / (log(2) held_out.num_bytes)

A batch is a dict of numpy arrays of this process's rows, [B / process_count, T] each: `tokens`
int32, `targets` int32 (the next token of the same document, at its end the tokenizer's eos_id),
`segment_ids` int32 (1, 2, ... along the row, 0 for padding) and `loss_mask` float32 (1 where
`targets` counts, 0 on padding).

The position in the data is the step. A checkpoint stores it with `fingerprint(config, corpus)`;
`check_fingerprint(saved, current)` refuses to go on with other data and says what differs.
"""

from rla_jax.data.batches import EvaluationBatches
from rla_jax.data.config import DataConfig
from rla_jax.data.corpus import Corpus, TokenSet, load_documents
from rla_jax.data.fingerprint import check_fingerprint
from rla_jax.data.packing import Batch
from rla_jax.data.pipeline import (
  evaluation_batches,
  fingerprint,
  load,
  steps_per_epoch,
  tokenizer_of,
  train_batches,
)
from rla_jax.data.sources import DataError, Document
from rla_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
  'Batch',
  'Corpus',
  'DataConfig',
  'DataError',
  'Document',
  'EvaluationBatches',
  'TokenSet',
  'Tokenizer',
  'check_fingerprint',
  'evaluation_batches',
  'fingerprint',
  'load',
  'load_documents',
  'load_tokenizer',
  'steps_per_epoch',
  'tokenizer_of',
  'train_batches',
]
