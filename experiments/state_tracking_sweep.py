"""State tracking: tasks x mixers x the range of beta, several seeds.

  python experiments/state_tracking_sweep.py --workdir=runs/tracking
  python experiments/state_tracking_sweep.py --workdir=runs/tracking --tasks=parity \\
      --mixers=delta_net --ranges=1,2 --seeds=0,1,2,3,4
  python experiments/state_tracking_sweep.py --workdir=runs/tracking --table_only

Models of configs/state_tracking.py, trained at one length and asked at that, twice and four times
it. The range of beta is (0, 1), or (0, 2) which gives the transitions negative eigenvalues. The
seeds of a row train together (experiments/sweeps/ensemble.py) while the programs of --ahead others
are compiled. The same command again skips what is finished and goes on with what is not; --budget
stops after so many seconds, with the state on disk. Writes results.csv, results.md, results.png and
curves.csv to --results; --set=key=value overrides keys of the config. What an earlier sweep left in
the curves.csv of --known counts as finished, and stands in the table.
"""

import functools
import pathlib
import runpy

from absl import flags
from sweeps import tracking_table
from sweeps.curves import Curves, read_known
from sweeps.ensemble import Member
from sweeps.overrides import with_overrides
from sweeps.runs import Run, Together, deadline, digest, train

from rla_jax.training import ConfigError
from rla_jax.training.command_line import choices, run

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = runpy.run_path(str(ROOT / 'configs' / 'state_tracking.py'))
RANGES = {'1': '(0, 1)', '2': '(0, 2)'}

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the sweep.', required=True)
_TASKS = flags.DEFINE_list('tasks', list(CONFIG['TASKS']), 'Tasks of configs/state_tracking.py.')
_MIXERS = flags.DEFINE_list('mixers', ['delta_net', 'gdn', 'rdn'], 'Layers that have a beta.')
_RANGES = flags.DEFINE_list('ranges', list(RANGES), 'Upper ends of the range of beta: 1, 2.')
_RATE = flags.DEFINE_float('rate', None, 'Peak learning rate; default: that of the config.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the parameters.')
_EVALUATE_EVERY = flags.DEFINE_integer(
  'evaluate_every', 1, 'Epochs between evaluations.', lower_bound=1
)
_AHEAD = flags.DEFINE_integer(
  'ahead', 1, 'Rows whose programs are compiled at once.', lower_bound=1
)
_BUDGET = flags.DEFINE_float('budget', None, 'Seconds after which it stops, to go on later.')
_SET = flags.DEFINE_multi_string('set', [], 'Overrides of the config, as in --set=steps=391.')
_KNOWN = flags.DEFINE_string('known', None, 'curves.csv of an earlier sweep of the same settings.')
_RESULTS = flags.DEFINE_string('results', None, 'Folder of table and figure; default: --workdir.')
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Only write table and figure again.')


def main(_):
  """Runs the sweep as the flags say, then writes its curves, table and figure."""
  root = pathlib.Path(_WORKDIR.value)
  curves = Curves(root, read_known(_KNOWN.value))
  if not _TABLE_ONLY.value:
    sweep(root, curves)
  found = curves.all()
  if not found:
    print('no run is finished yet')
    return
  print(tracking_table.write(pathlib.Path(_RESULTS.value or root), found))


def sweep(root: pathlib.Path, curves: Curves) -> None:
  """Trains what is not finished, task by task."""
  choices(_RANGES, _TASKS)
  try:
    seeds = [int(seed) for seed in _SEEDS.value]
  except ValueError as error:
    raise ConfigError(f'--seeds: {error}') from error
  late = deadline(_BUDGET.value)
  runs = [
    _run(root, task, mixer, end, seeds)
    for task in _TASKS.value for mixer in _MIXERS.value for end in _RANGES.value
  ]  # fmt: skip
  plan = [lambda found=found: found for found in runs]
  train(plan, curves, Together(_EVALUATE_EVERY.value, late, _AHEAD.value), late)


def _run(root, task, mixer, end, seeds) -> Run:
  words = [mixer, task] + (['negative'] if end == '2' else [])
  config = with_overrides(functools.partial(CONFIG['get_config'], ','.join(words)), _SET.value)
  if config.data.path != task:
    raise ConfigError(f'data.path is {config.data.path!r}; expected {task}')
  rate = _RATE.value or config.optimizer.learning_rate
  members = tuple(Member(rate, seed) for seed in seeds)
  columns = {'task': task, 'mixer': mixer, 'beta': RANGES[end]}
  return Run(root / f'{task}_{mixer}_{end}_{digest(members, _SET.value)}', config, members, columns)


if __name__ == '__main__':
  run(main)
