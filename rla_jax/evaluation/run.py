"""What every task of a suite is given."""

import dataclasses
import pathlib
from collections.abc import Sequence

from rla_jax.data import DataError
from rla_jax.evaluation import records
from rla_jax.evaluation.scorer import Scorer
from rla_jax.training.trained import TrainedModel


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to evaluate.

  Attributes:
    data_dir: folder of the evaluation sets, as `records` describes it; None: there are none.
    path: file, folder or glob of the text for `text` and of the haystacks for `needle`; None: what
      the run held out, and the set `haystack_public_domain`.
    window: tokens that the model sees at a time in `text` and `wikitext`; None: whole documents.
    stride: tokens between windows; None: window.
    chunk: tokens of one call of the model; longer texts carry the state.
    batch_tokens: tokens of a batch.
    batch_size: prompts that are continued at a time.
    limit: first samples or documents of each task; None: all.
    lengths: tokens of the texts in `needle` and of the sequences in `throughput`; None: theirs.
    mixers: layers that `throughput` compares, each in place of all layers; None: the run's own.
  """

  data_dir: str | None = None
  path: str | None = None
  window: int | None = None
  stride: int | None = None
  chunk: int = 2048
  batch_tokens: int = 16384
  batch_size: int = 16
  limit: int | None = None
  lengths: tuple[int, ...] | None = None
  mixers: tuple[str, ...] | None = None


def parse_lengths(words: Sequence[str]) -> tuple[int, ...]:
  """Lengths as they are written on a command line.

  Raises:
    DataError: a word that is no number of tokens.
  """
  for word in words:
    if not (word.isdecimal() and int(word)):
      raise DataError(f'length {word!r}; expected a number of tokens')
  return tuple(map(int, words))


class Skipped(Exception):
  """A task has no data or the wrong model; the message says what was looked for."""


@dataclasses.dataclass
class Run:
  """What a task works with: the model, the settings, and the folder for its tables and figures."""

  trained: TrainedModel
  scorer: Scorer
  settings: Settings
  folder: pathlib.Path

  def file(self, *names: str) -> pathlib.Path:
    """The file of a set, by the first of its names that is in the data folder.

    Raises:
      Skipped: there is none.
    """
    if self.settings.data_dir is None:
      raise Skipped('no data_dir is given')
    path = records.find(self.settings.data_dir, *names)
    if path is None:
      raise Skipped(records.absent(self.settings.data_dir, *names))
    return path
