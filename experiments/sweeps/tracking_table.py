"""What a sweep of state tracking found: scaled accuracy by length, as table and figure."""

import pathlib
import re

import numpy as np

from rla_jax.evaluation.figures import heat_map
from sweeps import results
from sweeps.remarks import measured

# Right answers of who always says the most frequent state. Of arithmetic modulo 5 it is 0, by the
# products: p = 2/3 * 1/5 + 1/3 * (1/5 + 4/5 * p).
CHANCE = {'parity': 1 / 2, 'modular_arithmetic': 3 / 11, 'permutations': 1 / 120}


def write(folder: pathlib.Path, found: list[dict]) -> str:
  """`results.write` of state tracking."""
  return results.write(folder, [_of_any_task(row) for row in found], table, figure)


def summary(rows: list[dict]) -> list[dict]:
  """One record a task, mixer and range of beta: scaled accuracies of every seed, by length."""
  groups: dict[tuple, list[dict]] = {}
  for row in rows:
    key = row['task'], row['mixer'], row['beta'], row['learning_rate']
    groups.setdefault(key, []).append(row)
  found = []
  for (task, mixer, beta, rate), group in groups.items():
    scaled = {
      name: [(row[name] - CHANCE[task]) / (1 - CHANCE[task]) for row in group]
      for name in lengths(rows)
    }
    found.append({
      'task': task, 'mixer': mixer, 'beta': beta, 'learning_rate': rate, 'seeds': len(group),
      'epochs': group[0]['epoch'], 'scaled': scaled,
    })  # fmt: skip
  return sorted(found, key=lambda r: (list(CHANCE).index(r['task']), r['mixer'], r['beta']))


def lengths(rows: list[dict]) -> list[str]:
  """The columns of the test sets, 'L64' and so on."""
  names = [name for name in rows[0] if re.fullmatch(r'L\d+', name)]
  return sorted(names, key=lambda name: int(name[1:]))


def table(rows: list[dict]) -> str:
  """Markdown: one line a task, mixer and range of beta."""
  head = ['task', 'mixer', 'beta', 'rate', 'seeds', 'epochs', *lengths(rows)]
  lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
  for r in summary(rows):
    cells = [r['task'], r['mixer'], r['beta'], f'{r["learning_rate"]:.2g}', r['seeds'], r['epochs']]
    cells += map(_cell, r['scaled'].values())
    lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
  lines += [
    '', 'Scaled accuracy by the length of the test set: 1 is all right, 0 who always says the most',
    'frequent state (' + ', '.join(f'{CHANCE[task]:.3g} of {task}' for task in CHANCE) + ').',
    'Mean of the seeds, and their range. Trained at the first length. Published, of parity with',
    'DeltaNet at other lengths (arXiv:2411.12537): 0.017 with beta in (0, 1), 1.000 in (0, 2).',
  ]  # fmt: skip
  return '\n'.join([*lines, '', *measured(rows, ('task', 'mixer', 'beta')), ''])


def figure(path: pathlib.Path, rows: list[dict]) -> None:
  """Mixers and ranges by tasks and lengths; the mean of the seeds, at least 0."""
  records, names = summary(rows), lengths(rows)
  tasks = list(dict.fromkeys(r['task'] for r in records))
  models = sorted({(r['mixer'], r['beta']) for r in records})
  values = np.full((len(models), len(tasks) * len(names)), np.nan)
  for r in records:
    start = tasks.index(r['task']) * len(names)
    means = [max(0.0, np.mean(r['scaled'][name])) for name in names]
    values[models.index((r['mixer'], r['beta'])), start : start + len(names)] = means
  middle = len(names) // 2  # a task is written once, below its lengths
  columns = [
    f'{name[1:]}\n{task.replace("_", " ") if place == middle else ""}'
    for task in tasks for place, name in enumerate(names)
  ]  # fmt: skip
  heat_map(
    path, values, columns, [f'{mixer}, beta in {beta}' for mixer, beta in models],
    'length and task', '', 'scaled accuracy (%)',
  )  # fmt: skip


def _cell(values: list[float]) -> str:
  if len(values) == 1:
    return f'{values[0]:.3f}'
  return f'{np.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})'


def _of_any_task(row: dict) -> dict:
  """Test sets by their lengths alone: 'L64' in place of 'parity L64'."""
  return {name if ' L' not in name else name.split()[-1]: value for name, value in row.items()}
