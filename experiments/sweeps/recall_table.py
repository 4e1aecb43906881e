"""What a sweep found: the best learning rate of each mixer and width, as table and figure."""

import pathlib
import re

import numpy as np

from rla_jax.evaluation.figures import curves
from rla_jax.evaluation.published import MQAR
from sweeps import results
from sweeps.remarks import measured


def write(folder: pathlib.Path, found: list[dict]) -> str:
  """`results.write` of recall."""
  return results.write(folder, found, table, figure)


def best_rate(rows: list[dict]) -> float:
  """The learning rate with the best mean accuracy, of one task, mixer and width.

  The mean is over the seeds that all rates have: more seeds, trained only at the rate that was best
  with these, do not change the choice. Where no seed is common it is over those that each rate has:
  nobody chose them by their results, so no rate is favoured, but the seeds differ as the rates do.
  """
  rates: dict[float, dict[int, float]] = {}
  for row in rows:
    rates.setdefault(row['learning_rate'], {})[row['seed']] = row['accuracy']
  common = set.intersection(*(set(runs) for runs in rates.values()))

  def mean(rate):
    return np.mean([x for seed, x in rates[rate].items() if seed in common or not common])

  return max(rates, key=mean)


def best(rows: list[dict]) -> list[dict]:
  """One record a task, mixer and width: its `best_rate`, with all seeds that this one has."""
  groups: dict[tuple, list[dict]] = {}
  for row in rows:
    groups.setdefault((row['task'], row['width'], row['mixer']), []).append(row)
  found = []
  for (task, width, mixer), group in sorted(groups.items()):
    rate = best_rate(group)
    runs = list({r['seed']: r for r in group if r['learning_rate'] == rate}.values())
    spread = np.std([r['accuracy'] for r in runs], ddof=1) if len(runs) > 1 else None
    sets = test_sets(runs[0])
    found.append({
      'task': task, 'mixer': mixer, 'width': width, 'state_bytes': runs[0]['state_bytes'],
      'accuracy': float(np.mean([r['accuracy'] for r in runs])), 'std': spread,
      'seeds': len(runs), 'learning_rate': rate, 'epochs': runs[0]['epoch'],
      'published': MQAR.get(mixer, {}).get(width) if task == 'mqar' else None,
      **{name: float(np.mean([r[name] for r in runs])) for name in sets},
    })  # fmt: skip
  return found


def test_sets(record: dict) -> list[str]:
  """The columns of the test sets, 'L64 N4' and so on, in the order of length and pairs."""
  found = [name for name in record if re.fullmatch(r'L\d+ N\d+', name)]
  return sorted(found, key=lambda name: [int(n) for n in re.findall(r'\d+', name)])


def table(rows: list[dict]) -> str:
  """Markdown: one line a task, mixer and width."""
  records = best(rows)
  sets = test_sets(records[0])
  head = ['task', 'mixer', 'd', 'state bytes', 'accuracy', 'published', 'rate', 'seeds', 'epochs']
  head += sets
  lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
  for r in records:
    spread = '' if r['std'] is None else f' ± {r["std"]:.3f}'
    published = '' if r['published'] is None else f'{r["published"]:.3f}'
    cells = [
      r['task'], r['mixer'], r['width'], f'{r["state_bytes"]:,}',
      f'{r["accuracy"]:.3f}{spread}', published,
      f'{r["learning_rate"]:.2g}', r['seeds'], r['epochs'], *(f'{r[name]:.3f}' for name in sets),
    ]  # fmt: skip
    lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
  lines += ['', 'Accuracy: mean over the test sets (L length, N pairs), best learning rate by the']
  lines += ['seeds that all rates have (if none, by those of each); mean ± standard deviation over']
  lines += ['its seeds.']
  lines += ['Published: read off a figure, ± 0.003.']
  return '\n'.join([*lines, '', *measured(rows, ('mixer', 'width')), ''])


def figure(path: pathlib.Path, rows: list[dict]) -> None:
  """Accuracy against the size of the state; with several seeds, bars of a standard deviation."""
  lines: dict[str, list[tuple]] = {}
  for r in best(rows):
    name = r['mixer'] if r['task'] == 'mqar' else f'{r["mixer"]}, {r["task"]}'
    points = {name: (r['accuracy'], r['std']), f'{name}, published': (r['published'], None)}
    for label, (accuracy, bar) in points.items():
      if r['state_bytes'] and accuracy is not None:
        lines.setdefault(label, []).append((r['state_bytes'], accuracy, bar))
  if lines:
    series = {name: list(zip(*points, strict=True)) for name, points in lines.items()}
    curves(
      path, {name: (x, y) for name, (x, y, _) in series.items()},
      'recurrent state of a sequence (bytes)', 'accuracy',
      bars={name: bar for name, (_, _, bar) in series.items() if None not in bar},
    )  # fmt: skip
