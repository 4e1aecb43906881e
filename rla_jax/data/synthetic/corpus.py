"""Synthetic tasks as a source of batches, in place of text: `format='synthetic'`, path the task.

    mqar                 multi-query associative recall, the Based setting
    mqar_reassigned      a quarter of the assignments replace a key's value
    parity, modular_arithmetic, permutations      state tracking; trained at seq_len
    needle_s1, needle_s2, needle_s3, needle_multikey    needle in a haystack, as text

A batch holds examples of one length and difficulty, padded to seq_len; training sets whose examples
are longer than seq_len are left out, and test sets that are over four times as long. The recall
tasks take their batches in the order of the sets, every epoch the same, as published; the others
shuffle them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator

import grain
import numpy as np

from rla_jax.data.batches import shuffled_rows
from rla_jax.data.config import DataConfig
from rla_jax.data.packing import Batch
from rla_jax.data.sources import DataError
from rla_jax.data.synthetic import tasks
from rla_jax.data.synthetic.examples import Examples
from rla_jax.data.tokenizer import Tokenizer

VERSION = 2


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleSets:
  """Sets of examples, each of one length."""

  sets: tuple[Examples, ...]

  @property
  def num_tokens(self) -> int:
    """Targets."""
    return sum(int(s.counts.sum()) for s in self.sets)


@dataclasses.dataclass(frozen=True, eq=False)
class SyntheticCorpus:
  """What `Corpus` is for text.

  Attributes:
    train: sets to learn from.
    validation: sets to test on.
    tokenizer: of the task's vocabulary.
    shuffled: whether an epoch has its batches in random order.
  """

  train: ExampleSets
  validation: ExampleSets
  tokenizer: Tokenizer
  shuffled: bool

  @classmethod
  def load(cls, config: DataConfig) -> 'SyntheticCorpus':
    """Draws the examples of the task that the config names; `seed` decides them.

    Raises:
      DataError: an unknown task, or one without examples of at most seq_len tokens.
    """
    task = tasks.find(config)
    train = tuple(s for s in task.train(config) if s.tokens.shape[1] <= config.seq_len)
    test = tuple(s for s in task.test(config) if s.tokens.shape[1] <= 4 * config.seq_len)
    if not train:
      raise DataError(f'task {config.path!r} has no examples of at most {config.seq_len} tokens')
    return cls(
      ExampleSets(train), ExampleSets(test), tasks.vocabulary(config), task.shuffled
    )

  def fingerprint(self, config: DataConfig) -> dict[str, str | int]:
    """Everything that decides the batches, as `rla_jax.data.fingerprint` has it for text."""
    digest = hashlib.sha256()
    for examples in (*self.train.sets, *self.validation.sets):
      digest.update(examples.tokens.tobytes())
      digest.update(examples.targets.tobytes())
    probe = self.order(1000, config.seed)
    entries = {
      'task': config.path, 'version': VERSION, 'tokens': digest.hexdigest(),
      'seq_len': config.seq_len, 'batch_size': config.batch_size, 'seed': config.seed,
      'order': ' '.join(str(int(probe[i])) for i in range(8)),
    }  # fmt: skip
    return {**entries, 'digest': hashlib.sha256(json.dumps(entries).encode()).hexdigest()}

  def train_batches(
    self, config: DataConfig, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
  ) -> Iterator[Batch]:
    """Batches from a step on, without end; the arguments of `rla_jax.data.train_batches`."""
    pieces = _pieces(self.train.sets, config.batch_size)
    rows = _rows(config.batch_size, process_index, process_count)

    def assemble(number):
      return _batch(self.train.sets, pieces[number], config.batch_size, config.seq_len, rows)

    batches = self.order(len(pieces), config.seed)[start_step:].map(assemble)
    options = grain.ReadOptions(
      num_threads=config.num_threads, prefetch_buffer_size=config.prefetch_batches
    )
    return iter(batches.to_iter_dataset(options))

  def order(self, count: int, seed: int) -> grain.MapDataset:
    """Numbers of the `count` batches, epoch after epoch."""
    if self.shuffled:
      return shuffled_rows(count, seed)
    return grain.MapDataset.range(count).repeat(max(1, 2**40 // count))

  def steps_per_epoch(self, config: DataConfig) -> float:
    """Steps in which every training example is seen once."""
    return float(len(_pieces(self.train.sets, config.batch_size)))

  def evaluation_batches(
    self,
    config: DataConfig,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ) -> 'SyntheticEvaluation':
    """The test sets in batches of one length each.

    Args:
      config: as for training.
      batch_size: examples of a batch; None: that of training.
      max_tokens: only the first examples of every set, with about so many targets together.
      process_index: this process.
      process_count: processes that share each batch.
    """
    sets = self.validation.sets
    if max_tokens is not None:
      share = min(1.0, max_tokens / self.validation.num_tokens)
      sets = tuple(s.first(max(1, int(share * len(s)))) for s in sets)
    batch_size = batch_size or config.batch_size
    return SyntheticEvaluation(sets, batch_size, _rows(batch_size, process_index, process_count))


class SyntheticEvaluation:
  """Batches that hold every target exactly once; may be iterated repeatedly.

  Attributes:
    num_documents: examples.
    num_tokens: targets.
    num_bytes: 0: there is no text.
  """

  num_bytes = 0

  def __init__(self, sets: tuple[Examples, ...], batch_size: int, rows: slice):
    """See `SyntheticCorpus.evaluation_batches`."""
    self._sets, self._batch_size, self._rows = sets, batch_size, rows
    self._pieces = _pieces(sets, batch_size)
    self.num_documents = sum(map(len, sets))
    self.num_tokens = sum(int(s.counts.sum()) for s in sets)

  def __len__(self) -> int:
    """Number of batches."""
    return len(self._pieces)

  def __iter__(self) -> Iterator[Batch]:
    """The batches in their one order."""
    for piece in self._pieces:
      length = self._sets[piece[0]].tokens.shape[1]
      yield _batch(self._sets, piece, self._batch_size, length, self._rows)


def _pieces(sets, batch_size) -> list[tuple[int, int]]:
  """(set, first example) of every batch."""
  return [(n, start) for n, s in enumerate(sets) for start in range(0, len(s), batch_size)]


def _rows(batch_size, process_index, process_count) -> slice:
  if process_count < 1 or not 0 <= process_index < process_count:
    raise ValueError(f'process_index is {process_index} of process_count {process_count}')
  if batch_size % process_count:
    raise ValueError(
      f'batch_size is {batch_size}, which process_count {process_count} does not divide'
    )
  size = batch_size // process_count
  return slice(process_index * size, (process_index + 1) * size)


def _batch(sets, piece, batch_size, length, rows) -> Batch:
  """One process's rows of a batch; the last batch of a set is filled up with masked rows."""
  number, start = piece
  examples = sets[number]
  stop = min(start + batch_size, len(examples))
  size = examples.tokens.shape[1]

  def padded(x_NT):
    x_BT = np.zeros((batch_size, length), x_NT.dtype)
    x_BT[: stop - start, :size] = x_NT[start:stop]
    return x_BT[rows]

  return {
    'tokens': padded(examples.tokens),
    'targets': padded(examples.targets),
    'segment_ids': padded(np.ones(examples.tokens.shape, np.int32)),
    'loss_mask': padded(examples.counts).astype(np.float32),
  }
