"""Results: one record a number; as JSON, as CSV, and as a table beside published ones."""

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from rla_jax.evaluation.published import PUBLISHED


@dataclasses.dataclass(frozen=True)
class Result:
  """One measured number.

  Attributes:
    suite: that it belongs to.
    task: within the suite.
    metric: what the number is.
    value: the number.
    samples: how many examples, documents or repetitions it is taken over.
    stderr: its standard error; None: not known.
  """

  suite: str
  task: str
  metric: str
  value: float
  samples: int
  stderr: float | None = None

  @property
  def name(self) -> str:
    """Task and metric, under which published numbers are listed."""
    return f'{self.task} {self.metric}'


def write(folder: pathlib.Path, results: Sequence[Result], record: dict[str, Any]) -> None:
  """Writes results.json, results.csv and results.md.

  Args:
    folder: where to; exists.
    results: the numbers. What is not finite becomes null in JSON.
    record: what a reader needs to know of the run: checkpoint, command, versions, hardware,
      what was skipped.
  """
  rows = [dataclasses.asdict(result) for result in results]
  for row in rows:
    row |= {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
  (folder / 'results.json').write_text(json.dumps({**record, 'results': rows}, indent=1) + '\n')
  write_rows(folder / 'results.csv', rows)
  (folder / 'results.md').write_text(markdown(results, record))


def write_rows(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """Writes records with the same keys as CSV; a file that is there was written to its end."""
  partial = path.with_name(f'{path.name}.partial')
  with partial.open('w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  partial.replace(path)


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of `write_rows`: numbers and truth values as such, None where nothing stands."""
  with path.open() as file:
    return [  # A commit may look like a number.
      {key: text if key == 'commit' else _value(text) for key, text in row.items()}
      for row in csv.DictReader(file)
    ]


def markdown(results: Sequence[Result], record: dict[str, Any]) -> str:
  """A table of the numbers; where published models have the same ones, a column for each."""
  columns = [
    model for model, row in PUBLISHED.items() if any(r.name in row.values for r in results)
  ]
  head = ['task', 'metric', 'this model', 'samples', *columns]
  lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
  for r in results:
    value = _number(r.value) + ('' if r.stderr is None else f' ± {_number(r.stderr)}')
    others = [_number(PUBLISHED[m].values.get(r.name)) for m in columns]
    lines.append('| ' + ' | '.join([r.task, r.metric, value, f'{r.samples:,}', *others]) + ' |')
  notes = [f'- {key}: {value}' for key, value in record.items()]
  sources = [f'- {model}: {PUBLISHED[model].source}' for model in columns]
  if sources:
    notes += ['', 'Published numbers, of other models on other data:', '', *sources]
  return '\n'.join([*lines, '', *notes, ''])


def _number(value: float | None) -> str:
  if value is None:
    return ''
  return f'{value:.4g}' if abs(value) < 1e5 else f'{value:.3e}'


def _value(text: str) -> bool | int | float | str | None:
  if text in ('True', 'False'):
    return text == 'True'
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text or None
