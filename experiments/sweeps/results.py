"""What every sweep leaves in its folder: curves, last records, a page and a figure."""

import pathlib
from collections.abc import Callable

from rla_jax.evaluation.results import write_rows
from sweeps.curves import last
from sweeps.remarks import write_above_remarks


def write(
  folder: pathlib.Path,
  curves: list[dict],
  table: Callable[[list[dict]], str],
  figure: Callable[[pathlib.Path, list[dict]], None],
) -> str:
  """Writes curves.csv, results.csv, results.md and results.png of a sweep; returns the table.

  What stands below a line `## Remarks` of a results.md that is there stays.
  """
  folder.mkdir(parents=True, exist_ok=True)
  rows = last(curves)
  write_rows(folder / 'curves.csv', curves)
  write_rows(folder / 'results.csv', rows)
  text = table(rows)
  write_above_remarks(folder / 'results.md', text)
  figure(folder / 'results.png', rows)
  return text
