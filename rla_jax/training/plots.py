"""Curves of training runs, drawn from their metrics."""

import os
import pathlib
from collections.abc import Sequence

from rla_jax.training.errors import WorkdirError
from rla_jax.training.metrics import read


def draw(
  runs: Sequence[str | os.PathLike],
  output: str | os.PathLike,
  train_metric: str = 'train/loss',
  eval_metric: str = 'eval/loss',
  levels: dict[str, float] | None = None,
) -> None:
  """Draws metrics over steps.

  Args:
    runs: working directories; each is a colour.
    output: image file.
    train_metric: drawn as a thin line.
    eval_metric: drawn with points.
    levels: values by name that are drawn as horizontal lines, to compare with.

  Raises:
    WorkdirError: a folder has no metrics.
  """
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.5), layout='constrained')
  for number, folder in enumerate(runs):
    path = pathlib.Path(folder) / 'metrics.jsonl'
    records = read(path)
    if not records:
      raise WorkdirError(f'{path} has no metrics')
    name = pathlib.Path(folder).name
    for metric, style in ((train_metric, {'linewidth': 1}), (eval_metric, {'marker': 'o'})):
      points = [(r['step'], r[metric]) for r in records if r.get(metric) is not None]
      if points:
        label = f'{name}: {metric}'
        axes.plot(*zip(*points, strict=True), color=f'C{number}', label=label, **style)
  for number, (name, level) in enumerate((levels or {}).items()):
    axes.axhline(level, color='gray', linestyle=('dotted', 'dashed', 'dashdot')[number % 3])
    axes.annotate(name, (1, level), xycoords=('axes fraction', 'data'), ha='right', va='bottom')
  axes.set_xlabel('step')
  axes.set_ylabel(f'{train_metric}, {eval_metric}')
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(output, dpi=150)
  pyplot.close(figure)
