"""Multi-query associative recall in the Based setting: mixers x widths x learning rates x seeds.

  python experiments/mqar_sweep.py --workdir=runs/mqar --mixers=delta_net,gdn --widths=64,128
  python experiments/mqar_sweep.py --workdir=runs/mqar --mixers=rdn,rla,sgla --more_seeds=1,2
  python experiments/mqar_sweep.py --workdir=runs/again --set=data.path=mqar_reassigned
  python experiments/mqar_sweep.py --workdir=runs/loop --notogether --rates=0.01
  python experiments/mqar_sweep.py --workdir=runs/mqar --table_only

All learning rates and seeds of a mixer at a width train together in one program
(experiments/mqar/ensemble.py), while that of the next mixer is compiled; --notogether trains one
after the other in the training loop, which gives the same up to rounding. The same command again
skips what is finished and goes on with what is not; --budget stops after so many seconds, with the
state on disk. The table takes the best learning rate of each, mean over the seeds, and stands
beside the published numbers. --more_seeds are trained after all else, at the learning rate that was
best with --seeds alone, which halves the work of three seeds. --set=key=value overrides keys of
configs/mqar.py.
"""

import datetime
import functools
import hashlib
import json
import pathlib
import runpy
import time

import jax
import numpy as np
from absl import flags
from mqar import table
from mqar.ahead import Ahead
from mqar.alone import train_alone
from mqar.ensemble import Ensemble, Member

from rla_jax.evaluation.results import write_rows
from rla_jax.models import LanguageModel
from rla_jax.training import ConfigError
from rla_jax.training.command_line import run, unknown_key
from rla_jax.training.config import check, leaves, model_config
from rla_jax.training.progress import duration

TASKS = ('mqar', 'mqar_reassigned')
RATES = tuple(float(f'{rate:.4g}') for rate in np.logspace(-3, -1.5, 4))
ROOT = pathlib.Path(__file__).resolve().parents[1]

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the sweep.', required=True)
_MIXERS = flags.DEFINE_list('mixers', ['delta_net', 'gdn'], 'Mixers of configs/mqar.py.')
_WIDTHS = flags.DEFINE_list('widths', ['64', '128'], 'Widths of the model.')
_RATES = flags.DEFINE_list('rates', [str(rate) for rate in RATES], 'Peak learning rates.')
_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Seeds of parameters and dropout.')
_MORE_SEEDS = flags.DEFINE_list('more_seeds', [], 'Seeds at the best learning rate only.')
_TOGETHER = flags.DEFINE_bool(
  'together', True, 'Train learning rates and seeds in one program; else one by one in the loop.'
)
_EVALUATE_EVERY = flags.DEFINE_integer(
  'evaluate_every', 4, 'Epochs between evaluations.', lower_bound=1
)
_BUDGET = flags.DEFINE_float('budget', None, 'Seconds after which it stops, to go on later.')
_SET = flags.DEFINE_multi_string('set', [], 'Overrides of the config, as in --set=steps=1414.')
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Only write table and figure again.')


def main(_):
  """Runs the sweep as the flags say, then writes results.csv, results.md and results.png."""
  root = pathlib.Path(_WORKDIR.value)
  if not _TABLE_ONLY.value:
    sweep(root)
  rows = table.collect(root)
  print(table.write(root, rows) if rows else 'no run is finished yet')


def sweep(root: pathlib.Path) -> None:
  """Trains what is not finished: every mixer and width, then again those with more seeds."""
  try:
    members = [Member(float(r), int(s)) for r in _RATES.value for s in _SEEDS.value]
    more_seeds = [int(s) for s in _MORE_SEEDS.value]
  except ValueError as error:
    raise ConfigError(f'--rates and the seeds: {error}') from error
  if again := {m.seed for m in members} & set(more_seeds):
    raise ConfigError(f'--more_seeds has {min(again)}, which --seeds has too; expected others')
  get_config = runpy.run_path(str(ROOT / 'configs' / 'mqar.py'))['get_config']
  jobs = [(mixer, width) for width in _WIDTHS.value for mixer in _MIXERS.value]
  configs = {job: _config(get_config, *job) for job in jobs}  # a wrong one fails at once
  begin = time.perf_counter()

  def late():
    return _BUDGET.value is not None and time.perf_counter() - begin > _BUDGET.value

  def find(job, is_second):
    """Folder, config and members of a run; None while its learning rate is not known."""
    found = members
    if is_second:
      curve = _folder(root, job, members) / 'curve.csv'
      if not curve.exists():
        return None
      chosen = table.best_rate(table.last(curve))
      found = [Member(chosen, seed) for seed in more_seeds]
    return _folder(root, job, found), configs[job], found

  plan = [(job, False) for job in jobs] + [(job, True) for job in jobs if more_seeds]
  ahead = Ahead(_build)
  for number, (job, is_second) in enumerate(plan):
    run = find(job, is_second)
    train = _one_by_one
    if _TOGETHER.value:
      later = [found for entry in plan[number + 1 :] if (found := find(*entry))]
      train = functools.partial(_together, ahead, [r for r in later if not _is_finished(r[0])])
    if not _train(f'{number + 1} of {len(plan)}', job, run, train, late):
      return


def _train(place, job, run, train, late) -> bool:
  """Trains the members of a mixer and width, or goes on; whether they are finished."""
  (folder, config, _), (mixer, width) = run, job
  if _is_finished(folder):
    print(f'{folder.name}: finished before, {place}')
    return True
  if late():
    print(f'{folder.name}: left for another call, the budget is spent')
    return False
  start = time.perf_counter()
  curve, finished = train(*run, late)
  common = {
    'task': config.data.path, 'mixer': mixer, 'width': int(width),
    'state_bytes': state_bytes(config),
  }  # fmt: skip
  rows = [{**common, **row, **provenance()} for row in curve]
  if not finished:
    if rows:
      write_rows(folder / 'unfinished.csv', rows)
    print(f'{folder.name}: stopped, the budget is spent; the same command goes on')
    return False
  write_rows(folder / 'curve.csv', rows)
  for name in ('state.npz', 'unfinished.csv'):
    (folder / name).unlink(missing_ok=True)
  # No time for the others: they differ in width, members and what of them is done.
  seconds = time.perf_counter() - start
  print(f'{folder.name}: finished in {duration(seconds)}, {place}', flush=True)
  return True


def _is_finished(folder) -> bool:
  return (folder / 'curve.csv').exists()


def _folder(root, job, members) -> pathlib.Path:
  """Of a mixer and width; its name tells other members or overrides apart."""
  text = json.dumps([[m.learning_rate, m.seed] for m in members] + _SET.value)
  digest = hashlib.sha256(text.encode()).hexdigest()[:6]
  return root / f'{job[0]}_d{job[1]}_{digest}'


def provenance() -> dict[str, str]:
  """When and where a run ended."""
  return {
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
    'device': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'jax': jax.__version__,
  }


def state_bytes(config) -> int:
  """Bytes of the recurrent states of one sequence in float32; 0 for attention."""
  model = LanguageModel(model_config(config, 8192))
  caches = jax.eval_shape(lambda: model.init_cache(1, 8))
  states = [cache.state for cache in caches if hasattr(cache, 'state')]
  return sum(4 * x.size for x in jax.tree.leaves(states))


def _build(folder, config, members) -> Ensemble:
  start = time.perf_counter()
  ensemble = Ensemble(config, members, folder)
  seconds = duration(time.perf_counter() - start)
  print(f'{folder.name}: data drawn and programs compiled in {seconds}', flush=True)
  return ensemble


def _together(ahead, later, folder, config, members, late) -> tuple[list[dict], bool]:
  """The members' curves, and whether they came to the end. The next one is made meanwhile."""
  ensemble = ahead.take(folder, folder, config, members)
  if later:
    ahead.begin(later[0][0], *later[0])
  first, ready = ensemble.epoch, time.perf_counter()

  def report(line):
    done, now = ensemble.epoch - first, time.perf_counter() - ready
    left = now / done * (ensemble.epochs - ensemble.epoch)
    print(f'{folder.name}  {line}  {duration(now)}, ETA {duration(left)}', flush=True)

  finished = ensemble.run(_EVALUATE_EVERY.value, report, late)
  return ensemble.curve, finished


def _one_by_one(folder, config, members, late) -> tuple[list[dict], bool]:
  """Likewise, of runs in the training loop."""
  rows = []
  for member in members:
    if late():
      return rows, False
    name = f'{member.learning_rate:g}_seed{member.seed}'
    row = train_alone(config, member, folder / name)
    if row is None:
      return rows, False
    rows.append(row)
  return rows, True


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
  if config.data.format != 'synthetic' or config.data.path not in TASKS:
    raise ConfigError(f'data.path is {config.data.path!r}; expected one of {", ".join(TASKS)}')
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


if __name__ == '__main__':
  run(main)
