"""Multi-query associative recall in the Based setting: mixers x widths x learning rates x seeds.

  python experiments/mqar_sweep.py --workdir=runs/mqar --mixers=delta_net,gdn --widths=64,128
  python experiments/mqar_sweep.py --workdir=runs/mqar --mixers=rdn,rla,sgla,two_state --seeds=0,1,2
  python experiments/mqar_sweep.py --workdir=runs/again --set=data.path=mqar_reassigned
  python experiments/mqar_sweep.py --workdir=runs/mqar --table_only

All learning rates and seeds of a mixer at a width train together (experiments/mqar_ensemble.py).
The same command again skips what is finished and goes on with what is not; --budget stops after so
many seconds, with the state on disk. The table takes the best learning rate of each, mean over the
seeds, and stands beside the published numbers. --set=key=value overrides keys of configs/mqar.py.
"""

import csv
import datetime
import json
import pathlib
import re
import runpy
import time

import numpy as np
from absl import flags

from rla_jax.training import ConfigError
from rla_jax.training.command_line import run, unknown_key
from rla_jax.training.config import check, leaves
from rla_jax.training.progress import duration

RATES = tuple(float(f'{rate:.4g}') for rate in np.logspace(-3, -1.5, 4))
ROOT = pathlib.Path(__file__).resolve().parents[1]
# Accuracy by width, read off a figure (+-0.003).
PUBLISHED = {
  'delta_net': {64: 0.793, 128: 0.963, 256: 0.995},
  'gdn': {64: 0.890, 128: 0.988, 256: 0.994},
  'gla': {64: 0.532, 128: 0.771, 256: 0.950},
}

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the sweep.', required=True)
_MIXERS = flags.DEFINE_list('mixers', ['delta_net', 'gdn'], 'Mixers of configs/mqar.py.')
_WIDTHS = flags.DEFINE_list('widths', ['64', '128'], 'Widths of the model.')
_RATES = flags.DEFINE_list('rates', [str(rate) for rate in RATES], 'Peak learning rates.')
_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Seeds of parameters and dropout.')
_EVALUATE_EVERY = flags.DEFINE_integer('evaluate_every', 4, 'Epochs between evaluations.')
_BUDGET = flags.DEFINE_float('budget', None, 'Seconds after which it stops, to go on later.')
_SET = flags.DEFINE_multi_string('set', [], 'Overrides of the config, as in --set=steps=1414.')
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Only write table and figure again.')


def main(_):
  """Runs the sweep as the flags say, then writes results.csv, results.md and results.png."""
  root = pathlib.Path(_WORKDIR.value)
  root.mkdir(parents=True, exist_ok=True)
  if not _TABLE_ONLY.value:
    sweep(root)
  rows = collect(root)
  if not rows:
    print('no run is finished yet')
    return 0
  write_csv(root / 'results.csv', rows)
  text = table(rows)
  (root / 'results.md').write_text(text)
  figure(root / 'results.png', rows)
  print(text)
  return 0


def sweep(root: pathlib.Path) -> None:
  """Trains what is not finished, an ensemble a mixer and width."""
  from mqar_ensemble import Ensemble, Member

  get_config = runpy.run_path(str(ROOT / 'configs' / 'mqar.py'))['get_config']
  try:
    members = [Member(float(r), int(s)) for r in _RATES.value for s in _SEEDS.value]
  except ValueError as error:
    raise ConfigError(f'--rates and --seeds: {error}') from error
  jobs = [(mixer, width) for width in _WIDTHS.value for mixer in _MIXERS.value]
  begin, seconds = time.perf_counter(), []
  configs = [_config(get_config, *job) for job in jobs]  # all, so that a wrong one fails at once
  for number, ((mixer, width), config) in enumerate(zip(jobs, configs, strict=True)):
    folder = root / f'{mixer}_d{width}_{_digest(members, _SET.value)}'
    if (folder / 'curve.csv').exists():
      print(f'{folder.name}: finished before')
      continue
    if late(begin):
      print(f'{folder.name}: left for another call, the budget is spent')
      return
    start = time.perf_counter()
    ensemble = Ensemble(config, members, folder)
    first, ready = ensemble.epoch, time.perf_counter()
    print(f'{folder.name}: ready after {duration(ready - start)}', flush=True)

    def report(line, name=folder.name, start=ready, first=first, ensemble=ensemble):
      done, now = ensemble.epoch - first, time.perf_counter() - start
      left = now / done * (ensemble.epochs - ensemble.epoch)
      print(f'{name}  {line}  {duration(now)}, ETA {duration(left)}', flush=True)

    finished = ensemble.run(_EVALUATE_EVERY.value, report, lambda: late(begin))
    seconds.append(time.perf_counter() - start)
    common = {'task': config.data.path, 'mixer': mixer, 'width': int(width)}
    common['state_bytes'] = state_bytes(config)
    rows = [{**common, **row, **provenance()} for row in ensemble.curve]
    if not finished:
      if rows:
        write_csv(folder / 'unfinished.csv', rows)
      print(f'{folder.name}: stopped after epoch {ensemble.epoch}; the same command goes on')
      return
    write_csv(folder / 'curve.csv', rows)
    for name in ('state.npz', 'unfinished.csv'):
      (folder / name).unlink(missing_ok=True)
    left = np.mean(seconds) * (len(jobs) - number - 1)
    print(f'{folder.name}: {duration(seconds[-1])}; sweep ETA {duration(left)}', flush=True)


def provenance() -> dict[str, str]:
  """When and where a run ended."""
  import jax

  return {
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
    'device': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'jax': jax.__version__,
  }


def late(begin: float) -> bool:
  """Whether the budget is spent."""
  return _BUDGET.value is not None and time.perf_counter() - begin > _BUDGET.value


def state_bytes(config) -> int:
  """Bytes of the recurrent states of one sequence in float32; 0 for attention."""
  import jax

  from rla_jax.models import LanguageModel
  from rla_jax.training.config import model_config

  model = LanguageModel(model_config(config, 8192))
  caches = jax.eval_shape(lambda: model.init_cache(1, 8))
  states = [cache.state for cache in caches if hasattr(cache, 'state')]
  return sum(4 * x.size for x in jax.tree.leaves(states))


def collect(root: pathlib.Path) -> list[dict]:
  """The last record of every finished run."""
  found = []
  for path in sorted(root.glob('*/curve.csv')):
    with path.open() as file:
      rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]
    last = max(row['epoch'] for row in rows)
    found += [row for row in rows if row['epoch'] == last]
  return found


def best(rows: list[dict]) -> list[dict]:
  """One record a task, mixer and width: the learning rate with the best mean over seeds."""
  groups: dict[tuple, dict[float, list[dict]]] = {}
  for row in rows:
    rates = groups.setdefault((row['task'], row['width'], row['mixer']), {})
    rates.setdefault(row['learning_rate'], []).append(row)
  found = []
  for (task, width, mixer), rates in sorted(groups.items()):
    means = {rate: np.mean([r['accuracy'] for r in runs]) for rate, runs in rates.items()}
    rate = max(means, key=means.get)
    runs = rates[rate]
    sets = test_sets(runs[0])
    found.append({
      'task': task, 'mixer': mixer, 'width': width, 'state_bytes': runs[0]['state_bytes'],
      'accuracy': float(means[rate]), 'std': float(np.std([r['accuracy'] for r in runs])),
      'seeds': len(runs), 'learning_rate': rate, 'epochs': runs[0]['epoch'],
      'published': PUBLISHED.get(mixer, {}).get(width) if task == 'mqar' else None,
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
    spread = f' ± {r["std"]:.3f}' if r['seeds'] > 1 else ''
    published = '' if r['published'] is None else f'{r["published"]:.3f}'
    cells = [
      r['task'], r['mixer'], r['width'], f'{r["state_bytes"]:,}',
      f'{r["accuracy"]:.3f}{spread}', published,
      f'{r["learning_rate"]:.2g}', r['seeds'], r['epochs'], *(f'{r[name]:.3f}' for name in sets),
    ]  # fmt: skip
    lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
  lines += ['', 'Accuracy: mean over the test sets (L length, N pairs), best learning rate,']
  lines += ['mean ± standard deviation over seeds. Published: read off a figure, ± 0.003.']
  where = sorted({f'{r["date"]}, {r["device"]}, jax {r["jax"]}' for r in rows if 'date' in r})
  lines += ['', *(f'Measured {place}.' for place in where), '']
  return '\n'.join(lines)


def figure(path: pathlib.Path, rows: list[dict]) -> None:
  """Accuracy against the size of the state."""
  from rla_jax.evaluation.figures import curves

  lines: dict[str, tuple[list, list]] = {}
  for r in best(rows):
    name = r['mixer'] if r['task'] == 'mqar' else f'{r["mixer"]}, {r["task"]}'
    points = {name: r['accuracy'], f'{name}, published': r['published']}
    for name, accuracy in points.items():
      if r['state_bytes'] and accuracy is not None:
        x, y = lines.setdefault(name, ([], []))
        x.append(r['state_bytes'])
        y.append(accuracy)
  if lines:
    curves(path, lines, 'recurrent state of a sequence (bytes)', 'accuracy')


def write_csv(path: pathlib.Path, rows: list[dict]) -> None:
  """Writes records with the same keys."""
  partial = path.with_suffix('.partial')
  with partial.open('w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
  partial.replace(path)


def _digest(members, overrides) -> str:
  import hashlib

  text = json.dumps([[m.learning_rate, m.seed] for m in members] + list(overrides))
  return hashlib.sha256(text.encode()).hexdigest()[:6]


def _config(get_config, mixer: str, width: str):
  try:
    config = get_config(f'{mixer},{width}')
    changes = dict(_parse(item) for item in _SET.value)
    for key in changes:
      if key not in leaves(config):
        raise ValueError(unknown_key(key, config))
    config.update_from_flattened_dict(changes)
  except (ValueError, TypeError) as error:
    raise ConfigError(' '.join(str(error).split())) from error
  check(config)
  return config


def _parse(item: str):
  key, equals, value = item.partition('=')
  if not equals:
    raise ValueError(f'--set={item}; expected key=value')
  try:
    return key, json.loads(value)
  except ValueError:
    return key, value


def _number(text: str):
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text


if __name__ == '__main__':
  run(main)
