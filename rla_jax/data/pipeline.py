"""One set of functions for whatever a config names as its source: text, or a synthetic task."""

from collections.abc import Iterator

from rla_jax.data import batches
from rla_jax.data.batches import EvaluationBatches
from rla_jax.data.config import DataConfig
from rla_jax.data.corpus import Corpus
from rla_jax.data.fingerprint import fingerprint as text_fingerprint
from rla_jax.data.packing import Batch
from rla_jax.data.synthetic.corpus import SyntheticCorpus, SyntheticEvaluation
from rla_jax.data.synthetic.tasks import vocabulary
from rla_jax.data.tokenizer import Tokenizer, load_tokenizer


def load(config: DataConfig) -> Corpus | SyntheticCorpus:
  """Reads or draws what the config names.

  Raises:
    DataError: see `Corpus.load` and `SyntheticCorpus.load`.
  """
  return SyntheticCorpus.load(config) if config.format == 'synthetic' else Corpus.load(config)


def tokenizer_of(config: DataConfig) -> Tokenizer:
  """The tokenizer of `load(config)`, without the data.

  Raises:
    DataError: see `load_tokenizer`; an unknown task.
  """
  return vocabulary(config) if config.format == 'synthetic' else load_tokenizer(config.tokenizer)


def train_batches(
  config: DataConfig, corpus: Corpus | SyntheticCorpus, **options
) -> Iterator[Batch]:
  """See `batches.train_batches`."""
  if isinstance(corpus, SyntheticCorpus):
    return corpus.train_batches(config, **options)
  return batches.train_batches(config, corpus, **options)


def steps_per_epoch(config: DataConfig, corpus: Corpus | SyntheticCorpus) -> float:
  """Steps in which everything to learn from is seen once."""
  if isinstance(corpus, SyntheticCorpus):
    return corpus.steps_per_epoch(config)
  return batches.steps_per_epoch(config, corpus)


def evaluation_batches(
  config: DataConfig, corpus: Corpus | SyntheticCorpus, **options
) -> EvaluationBatches | SyntheticEvaluation:
  """See `batches.evaluation_batches`."""
  if isinstance(corpus, SyntheticCorpus):
    return corpus.evaluation_batches(config, **options)
  return batches.evaluation_batches(config, corpus, **options)


def fingerprint(config: DataConfig, corpus: Corpus | SyntheticCorpus) -> dict[str, str | int]:
  """See `rla_jax.data.fingerprint`."""
  if isinstance(corpus, SyntheticCorpus):
    return corpus.fingerprint(config)
  return text_fingerprint(config, corpus)
