"""Batches in an order that is a function of (seed, step), through Grain."""

from collections.abc import Iterator

import numpy as np

from rla_jax.data.config import DataConfig
from rla_jax.data.corpus import Corpus, TokenSet
from rla_jax.data.packing import Batch, Packing, pack

try:
  import grain
except ModuleNotFoundError as error:
  raise ModuleNotFoundError("grain is not installed: pip install -e '.[train]'") from error

# Rows of a training run, beyond any: a million a second for 140 years. Grain's own endless repeat
# overflows when it is batched by one, since the length of a batched dataset passes through a float.
_ENDLESS_ROWS = 2**52


def train_batches(
  config: DataConfig,
  corpus: Corpus,
  *,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """The training batches from a step on, without end; each epoch has its own order.

  Step s takes rows s B to (s + 1) B of the sequence of shuffled epochs, whatever the number of
  processes; process p gets the p-th of process_count equal, contiguous parts. To resume at step k
  is to ask for start_step=k, which costs nothing.

  Args:
    config: the config that `corpus` was loaded with.
    corpus: the tokenised corpus.
    start_step: first step.
    process_index: this process, as jax.process_index().
    process_count: processes that share each batch, as jax.process_count().

  Returns:
    An endless Grain iterator; threads assemble batches ahead.

  Raises:
    ValueError: process_count does not divide batch_size, or an index is out of range.
  """
  local_size = _local_size(config.batch_size, process_index, process_count)
  if start_step < 0:
    raise ValueError(f'start_step is {start_step}, expected at least 0')
  packing = pack(corpus.train, config.seq_len, config.seed)
  # Batches of a process's size: those of process p are number p of every process_count.
  local = shuffled_rows(packing.num_rows, config.seed).batch(local_size)
  steps = local[start_step * process_count + process_index :: process_count]
  return iter(_assembled(steps, packing, config))


def steps_per_epoch(config: DataConfig, corpus: Corpus) -> float:
  """Steps in which every training row is seen once."""
  return pack(corpus.train, config.seq_len, config.seed).num_rows / config.batch_size


def shuffled_rows(num_rows: int, seed: int) -> grain.MapDataset:
  """Row numbers: epoch after epoch, without end, each in its own order."""
  # Grain's epoch e uses seed + e; hashing keeps neighbouring seeds from sharing epochs.
  shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
  num_epochs = max(1, _ENDLESS_ROWS // num_rows)
  return grain.MapDataset.range(num_rows).shuffle(seed=shuffle_seed).repeat(num_epochs)


class EvaluationBatches:
  """Batches that hold every target of some documents exactly once; may be iterated repeatedly.

  Attributes:
    num_documents: documents evaluated.
    num_tokens: targets, eos of each document included; the sum of all processes' loss_mask.
    num_bytes: UTF-8 bytes of these documents: bits per byte = nats / (log(2) num_bytes).
  """

  def __init__(
    self,
    documents: TokenSet,
    config: DataConfig,
    batch_size: int,
    process_index: int,
    process_count: int,
  ):
    """See `evaluation_batches`."""
    self.num_documents = documents.num_documents
    self.num_tokens = documents.num_tokens
    self.num_bytes = documents.num_bytes
    local_size = _local_size(batch_size, process_index, process_count)
    self._config = config
    self._packing = pack(documents, config.seq_len, seed=0)
    self._num_batches = -(-self._packing.num_rows // batch_size)
    rows = np.full(self._num_batches * batch_size, -1)
    rows[: self._packing.num_rows] = np.arange(self._packing.num_rows)
    self._rows = rows.reshape(-1, process_count, local_size)[:, process_index]

  def __len__(self) -> int:
    """Number of batches, the same for every process."""
    return self._num_batches

  def __iter__(self) -> Iterator[Batch]:
    """The batches in their one order."""
    return iter(_assembled(grain.MapDataset.source(self._rows), self._packing, self._config))


def evaluation_batches(
  config: DataConfig,
  corpus: Corpus,
  *,
  batch_size: int | None = None,
  max_tokens: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> EvaluationBatches:
  """The held-out documents as batches, each token a target exactly once.

  Long documents are cut into rows, and each row is predicted from its own tokens only. The last
  batch is filled up with rows whose loss_mask is 0.

  Args:
    config: the config that `corpus` was loaded with.
    corpus: the tokenised corpus.
    batch_size: rows of the global batch; None takes that of training.
    max_tokens: evaluates only as many whole documents, in the corpus's order, as have at most
      this many tokens together, and at least one; None evaluates all.
    process_index: this process.
    process_count: processes that share each batch.

  Returns:
    The batches, with the numbers of documents, tokens and bytes they hold over all processes.

  Raises:
    ValueError: process_count does not divide the batch size, or an argument is out of range.
  """
  documents = corpus.validation
  if max_tokens is not None:
    if max_tokens < 1:
      raise ValueError(f'max_tokens is {max_tokens}, expected at least 1 or None')
    total = np.cumsum(documents.lengths - 1)
    documents = documents.select(np.arange(max(1, int((total <= max_tokens).sum()))))
  batch_size = config.batch_size if batch_size is None else batch_size
  return EvaluationBatches(documents, config, batch_size, process_index, process_count)


def _assembled(
  rows: grain.MapDataset, packing: Packing, config: DataConfig
) -> grain.IterDataset:
  return rows.map(packing.rows).to_iter_dataset(
    grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch_batches)
  )


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
  if process_count < 1 or not 0 <= process_index < process_count:
    raise ValueError(f'process_index is {process_index} of process_count {process_count}')
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch_size is {batch_size}, which process_count {process_count} does not divide'
    )
  return batch_size // process_count
