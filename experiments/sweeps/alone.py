"""A member of a sweep by itself, in the library's training loop."""

import os
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from rla_jax import data
from rla_jax.evaluation.synthetic import correct
from rla_jax.models import LanguageModel
from rla_jax.training import train_and_evaluate
from rla_jax.training.config import check, model_config
from rla_jax.training.metrics import read
from sweeps.ensemble import Member


def train_alone(config: ConfigDict, member: Member, folder: str | os.PathLike) -> dict | None:
  """Trains, or goes on; then asks the test sets.

  Args:
    config: of the run, but for learning rate and seed; data of `format='synthetic'`.
    member: both.
    folder: working directory of the run.

  Returns:
    A record as those of `Ensemble.curve`; its loss is the mean of what the last epoch logged. None
    if a signal ended the run early.
  """
  config = config.copy_and_resolve_references()
  config.seed, config.optimizer.learning_rate = member.seed, member.learning_rate
  outcome = train_and_evaluate(config, folder)
  if outcome.stopped_by:
    return None
  data_config = check(config)
  corpus = data.load(data_config)
  model = LanguageModel(model_config(config, corpus.tokenizer.vocab_size))
  params = jax.device_get(outcome.state.params)
  by_set = {}
  for examples in corpus.validation.sets:
    right = correct(model, params, examples, batch_tokens=16384)
    by_set[examples.name] = float(right[examples.counts].mean())
  epoch = data.steps_per_epoch(data_config, corpus)
  records = read(pathlib.Path(folder) / 'metrics.jsonl')
  last = [r for r in records if r['step'] > config.steps - epoch and 'train/loss' in r]
  return {
    'epoch': round(config.steps / epoch), 'learning_rate': member.learning_rate,
    'seed': member.seed, 'loss': float(np.mean([r['train/loss'] for r in last])),
    'accuracy': float(np.mean(list(by_set.values()))), **by_set,
  }  # fmt: skip
