"""Accuracy on the test sets of the synthetic task that a checkpoint was trained on.

Recall (`mqar`): every set by itself, and the mean over the sets, which is the published score.
State tracking: by length and by position; beyond the length of training it shows whether the state
is tracked or remembered.
"""

import functools
import itertools

import jax
import numpy as np

from rla_jax import data
from rla_jax.data.synthetic import Examples
from rla_jax.evaluation import figures, results
from rla_jax.evaluation.perplexity import position_edges
from rla_jax.evaluation.results import Result
from rla_jax.evaluation.run import Run, Skipped
from rla_jax.models import LanguageModel
from rla_jax.training.config import check


def evaluate(run: Run, suite: str, task: str) -> list[Result]:
  """Runs a task of `rla_jax.data.synthetic.tasks.TASKS`; writes {task}.csv, and a figure.

  Raises:
    Skipped: the checkpoint was trained on something else.
  """
  config = check(run.trained.config)
  if config.format != 'synthetic' or config.path != task:
    what = config.path if config.format == 'synthetic' else 'text'
    raise Skipped(f'the checkpoint was trained on {what}')
  found, rows = [], []
  corpus = data.load(config)
  for examples in corpus.validation.sets:
    examples = examples.first(run.settings.limit)
    right = correct(run.trained.model, run.trained.params, examples, run.settings.batch_tokens)
    score = float(right[examples.counts].mean())
    name = examples.name.replace(' ', '_')
    found.append(Result(suite, task, f'accuracy_{name}', score, len(examples)))
    rows += _by_position(examples, right)
  mean = float(np.mean([result.value for result in found]))
  found.insert(0, Result(suite, task, 'accuracy', mean, sum(r.samples for r in found)))
  results.write_rows(run.folder / f'{task}.csv', rows)
  if suite == 'state_tracking':
    figures.curves(run.folder / f'{task}.png', _lines(rows), 'position', 'accuracy')
  return found


def correct(model: LanguageModel, params, examples: Examples, batch_tokens: int) -> np.ndarray:
  """Where the target is a most probable token, bool [N, T].

  Args:
    model: the language model.
    params: its parameters.
    examples: what to ask.
    batch_tokens: tokens of one call of the model.
  """
  count, length = examples.tokens.shape
  size = min(count, max(1, batch_tokens // length))
  pieces = []
  for start in range(0, count, size):
    # The last batch is filled up: another shape would be compiled anew.
    index = np.minimum(np.arange(start, start + size), count - 1)
    batch = _correct(model, params, examples.tokens[index], examples.targets[index])
    pieces.append(np.asarray(batch)[: count - start])
  return np.concatenate(pieces)


@functools.partial(jax.jit, static_argnums=0)
def _correct(model, params, tokens_BT, targets_BT):
  return model.apply({'params': params}, tokens_BT, targets_BT, method='score').correct


def _by_position(examples: Examples, right: np.ndarray) -> list[dict]:
  edges = position_edges(examples.tokens.shape[1])
  rows = []
  for first, after in itertools.pairwise(edges):
    counts = examples.counts[:, first:after]
    if counts.any():
      share = right[:, first:after][counts].mean()
      rows.append({
        'set': examples.name, 'first': int(first), 'last': int(after) - 1,
        'targets': int(counts.sum()), 'accuracy': float(share),
      })  # fmt: skip
  return rows


def _lines(rows: list[dict]) -> dict[str, tuple[list, list]]:
  lines: dict[str, tuple[list, list]] = {}
  for row in rows:
    x, y = lines.setdefault(row['set'], ([], []))
    x.append((row['first'] + row['last']) / 2 + 1)
    y.append(row['accuracy'])
  return lines
