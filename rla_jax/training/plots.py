"""Curves of training runs, drawn from their metrics.jsonl."""

import os
import pathlib
from collections.abc import Sequence

from rla_jax.training.errors import WorkdirError
from rla_jax.training.metrics import read


def draw(
  runs: Sequence[str | os.PathLike],
  output: str | os.PathLike,
  metrics: Sequence[Sequence[str]] = (('train/loss', 'eval/loss'),),
  levels: dict[str, float] | None = None,
) -> None:
  """Draws metrics over steps.

  Args:
    runs: working directories; each is a colour.
    output: image file.
    metrics: one panel for each group of names, such as 'gates/alpha/00'; those of evaluations are
      drawn with points. A name that ends in '/' stands for all that begin with it.
    levels: values by name that are drawn as horizontal lines in the first panel.

  Raises:
    WorkdirError: a folder has no metrics, or a name is in none of them.
  """
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  records = {}
  for folder in runs:
    path = pathlib.Path(folder) / 'metrics.jsonl'
    if not path.parent.is_dir():
      raise WorkdirError(f'{folder} does not exist')
    records[pathlib.Path(folder)] = read(path)
    if not records[pathlib.Path(folder)]:
      raise WorkdirError(f'{path} has no metrics')
  known = sorted({name for run in records.values() for record in run for name in record})
  size = 7, 0.5 + 4 * len(metrics)
  figure, panels = pyplot.subplots(len(metrics), figsize=size, squeeze=False, layout='constrained')
  for axes, names in zip(panels[:, 0], metrics, strict=True):
    for number, (folder, run) in enumerate(records.items()):
      for shade, name in enumerate(_expand(names, known)):
        _draw_one(axes, run, name, f'{folder.name}: {name}', f'C{number}', shade)
    axes.set_ylabel(', '.join(names))
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
  for number, (name, level) in enumerate((levels or {}).items()):
    axes = panels[0, 0]
    axes.axhline(level, color='gray', linestyle=('dotted', 'dashed', 'dashdot')[number % 3])
    axes.annotate(name, (1, level), xycoords=('axes fraction', 'data'), ha='right', va='bottom')
  panels[-1, 0].set_xlabel('step')
  figure.savefig(output, dpi=150)
  pyplot.close(figure)


def _draw_one(axes, run, name, label, color, shade):
  points = [(record['step'], record[name]) for record in run if record.get(name) is not None]
  if points:
    style = {'marker': 'o'} if name.startswith('eval/') else {'linewidth': 1}
    axes.plot(*zip(*points, strict=True), color=color, alpha=max(0.2, 1 - 0.1 * shade), label=label,
              **style)  # fmt: skip


def _expand(names, known) -> list[str]:
  """The metrics that some names stand for."""
  found = []
  for name in names:
    matches = [k for k in known if k == name or (name.endswith('/') and k.startswith(name))]
    if not matches:
      raise WorkdirError(f'no run has the metric {name!r}; there are {", ".join(known)}')
    found += matches
  return found
