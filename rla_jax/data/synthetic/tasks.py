"""The synthetic tasks by name: their vocabulary, and what they draw for training and test."""

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from rla_jax.data.config import DataConfig
from rla_jax.data.sources import DataError
from rla_jax.data.synthetic import state_tracking
from rla_jax.data.synthetic.examples import Examples
from rla_jax.data.synthetic.mqar import based_test, based_train
from rla_jax.data.synthetic.needle import NEEDLES, manual, needle_examples
from rla_jax.data.tokenizer import Tokenizer, load_tokenizer

REASSIGNED = 0.25
STATE_TRACKING_TRAIN, STATE_TRACKING_TEST = 100_000, 1000  # examples
NEEDLE_TRAIN, NEEDLE_TEST = 20_000, 200  # examples


class IdTokenizer(Tokenizer):
  """Ids written as numbers with spaces between them; there is no text behind a synthetic task."""

  name = 'ids'
  bos_id = eos_id = 0

  def __init__(self, vocab_size: int):
    """For ids below vocab_size."""
    self.vocab_size = vocab_size
    self.fingerprint = hashlib.sha256(f'ids below {vocab_size}'.encode()).hexdigest()

  def encode_batch(self, texts):
    words = [text.split() for text in texts]
    for word in (word for text in words for word in text):
      if not (word.isdecimal() and int(word) < self.vocab_size):
        raise DataError(f'text {word!r}; the model knows ids alone, below {self.vocab_size}')
    return [np.array(text, np.int32) for text in words]

  def decode(self, ids):
    return ' '.join(str(int(i)) for i in ids)


@dataclasses.dataclass(frozen=True)
class Task:
  """Where the examples of a task come from; see `TASKS`.

  Attributes:
    vocab_size: tokens; None: those of the config's tokenizer.
    train: draws the sets to learn from.
    test: draws the sets to test on.
    shuffled: whether an epoch has its batches in random order.
  """

  vocab_size: int | None
  train: Callable[[DataConfig], list[Examples]]
  test: Callable[[DataConfig], list[Examples]]
  shuffled: bool = True


def _recall(reassigned: float) -> Task:
  return Task(
    8192, lambda c: based_train(c.seed, reassigned), lambda c: based_test(c.seed, reassigned),
    shuffled=False,
  )  # fmt: skip


def _tracking(vocab_size: int, draw) -> Task:
  def seeds(config):
    return np.random.SeedSequence(config.seed).spawn(4)

  def train(config):
    return [draw(seeds(config)[0], config.seq_len, STATE_TRACKING_TRAIN)]

  def test(config):
    sizes = (config.seq_len * factor for factor in (1, 2, 4))
    pairs = zip(seeds(config)[1:], sizes, strict=True)
    return [draw(seed, length, STATE_TRACKING_TEST) for seed, length in pairs]

  return Task(vocab_size, train, test)


def _needle(name: str) -> Task:
  def draw(config, seed, length, count):
    essay = manual() if NEEDLES[name].haystack == 'essay' else ''
    return needle_examples(seed, name, length, count, load_tokenizer(config.tokenizer), essay)

  def train(config):
    return [draw(config, (config.seed, 0), config.seq_len, NEEDLE_TRAIN)]

  def test(config):
    return [draw(config, (config.seed, 1), config.seq_len * n, NEEDLE_TEST) for n in (1, 2)]

  return Task(None, train, test)


TASKS = {
  'mqar': _recall(0.0),
  'mqar_reassigned': _recall(REASSIGNED),
  'parity': _tracking(2, state_tracking.parity),
  'modular_arithmetic': _tracking(15, state_tracking.modular_arithmetic),
  'permutations': _tracking(120, state_tracking.permutations),
  **{name: _needle(name) for name in NEEDLES},
}


def vocabulary(config: DataConfig) -> Tokenizer:
  """The tokenizer of a task, without drawing its examples.

  Raises:
    DataError: an unknown task.
  """
  size = find(config).vocab_size
  return load_tokenizer(config.tokenizer) if size is None else IdTokenizer(size)


def find(config: DataConfig) -> Task:
  """The task that the config names.

  Raises:
    DataError: there is none of that name.
  """
  if config.path not in TASKS:
    raise DataError(f'unknown synthetic task {config.path!r} (path); tasks: {", ".join(TASKS)}')
  return TASKS[config.path]
