"""Figures of evaluations."""

import itertools
import os
from collections.abc import Mapping, Sequence

import numpy as np

_MARKERS = 'os^Dv>*'  # seven, beside ten colours: no two of seventy lines look alike


def curves(
  output: str | os.PathLike,
  lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  x_label: str,
  y_label: str,
  *,
  log_y: bool = False,
  bars: Mapping[str, Sequence[float]] | None = None,
) -> None:
  """Draws lines, {name: (x, y)}, over an axis that is logarithmic to base 2.

  Args:
    output: image file.
    lines: points by the name in the legend.
    x_label: what x is, with its unit.
    y_label: likewise.
    log_y: whether the axis is logarithmic.
    bars: half the length of a bar at every point, for some of the lines.
  """
  pyplot = _pyplot()
  many = len(lines) > 6
  figure, axes = pyplot.subplots(figsize=(8.5 if many else 6.5, 4), layout='constrained')
  for (name, (x, y)), marker in zip(lines.items(), itertools.cycle(_MARKERS)):
    bar = (bars or {}).get(name)
    axes.errorbar(x, y, bar, marker=marker, markersize=4, linewidth=1.2, capsize=3, label=name)
  axes.set_xscale('log', base=2)
  if log_y:
    axes.set_yscale('log')
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.grid(alpha=0.3)
  if many:  # beside the points, not on them
    figure.legend(loc='outside right upper')
  else:
    axes.legend()
  figure.savefig(output, dpi=150)
  pyplot.close(figure)


def heat_map(
  output: str | os.PathLike,
  values: np.ndarray,
  x_ticks: Sequence[str],
  y_ticks: Sequence[str],
  x_label: str,
  y_label: str,
  title: str,
) -> None:
  """Draws a matrix of shares in [0, 1], with the percentages in the cells; NaN cells stay empty.

  Args:
    output: image file.
    values: [rows, columns].
    x_ticks: names of the columns.
    y_ticks: names of the rows.
    x_label: what the columns are.
    y_label: what the rows are.
    title: of the figure.
  """
  pyplot = _pyplot()
  rows, columns = values.shape
  size = 2 + 0.7 * columns, 1.5 + 0.35 * rows
  figure, axes = pyplot.subplots(figsize=size, layout='constrained')
  image = axes.imshow(values, vmin=0, vmax=1, cmap='RdYlGn', aspect='auto')
  for row, column in np.argwhere(np.isfinite(values)):
    axes.text(column, row, f'{100 * values[row, column]:.0f}', ha='center', va='center', size=8)
  axes.set_xticks(range(columns), x_ticks)
  axes.set_yticks(range(rows), y_ticks)
  axes.set_xlabel(x_label)
  axes.set_ylabel(y_label)
  axes.set_title(title)
  figure.colorbar(image)
  figure.savefig(output, dpi=150)
  pyplot.close(figure)


def _pyplot():
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot

  return pyplot
