"""Multi-query associative recall in the Based setting: mixers x widths x learning rates x seeds.

  python experiments/mqar_sweep.py --workdir=runs/mqar --mixers=delta_net,gdn --widths=64,128
  python experiments/mqar_sweep.py --workdir=runs/mqar --mixers=rdn,rla,sgla --more_seeds=1,2
  python experiments/mqar_sweep.py --workdir=runs/again --set=data.path=mqar_reassigned
  python experiments/mqar_sweep.py --workdir=runs/loop --notogether --rates=0.01
  python experiments/mqar_sweep.py --workdir=runs/mqar --table_only

All learning rates and seeds of a mixer at a width train together in one program
(experiments/sweeps/ensemble.py), while that of the next mixer is compiled; --notogether trains one
after the other in the training loop, which gives the same up to rounding. The same command again
skips what is finished and goes on with what is not; --budget stops after so many seconds, with the
state on disk. The table takes the best learning rate of each, mean over the seeds, and stands
beside the published numbers. --more_seeds are trained after all else of their width, at the
learning rate that was best with --seeds alone, which halves the work of three seeds.
--set=key=value overrides keys of configs/mqar.py.

What an earlier sweep left in its curves.csv counts as finished, and stands in the table:

  python experiments/mqar_sweep.py --workdir=runs/mqar --more_seeds=1,2 \\
      --known=experiments/results/mqar/curves.csv --results=experiments/results/mqar
"""

import functools
import pathlib
import runpy

import jax
import numpy as np
from absl import flags
from sweeps import recall_table
from sweeps.alone import train_alone
from sweeps.curves import Curves, last, read_known
from sweeps.ensemble import Member
from sweeps.overrides import with_overrides
from sweeps.runs import Run, Together, deadline, digest, train

from rla_jax.models import LanguageModel
from rla_jax.training import ConfigError
from rla_jax.training.command_line import run
from rla_jax.training.config import model_config

TASKS = ('mqar', 'mqar_reassigned')
RATES = tuple(float(f'{rate:.4g}') for rate in np.logspace(-3, -1.5, 4))
ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = runpy.run_path(str(ROOT / 'configs' / 'mqar.py'))

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
_KNOWN = flags.DEFINE_string('known', None, 'curves.csv of an earlier sweep of the same settings.')
_RESULTS = flags.DEFINE_string('results', None, 'Folder of table and figure; default: --workdir.')
_TABLE_ONLY = flags.DEFINE_bool('table_only', False, 'Only write table and figure again.')


def main(_):
  """Runs the sweep as the flags say, then writes its curves, table and figure."""
  root = pathlib.Path(_WORKDIR.value)
  curves = Curves(root, read_known(_KNOWN.value), CONFIG['EPOCHS'])
  if not _TABLE_ONLY.value:
    sweep(root, curves)
  found = curves.all()
  if not found:
    print('no run is finished yet')
    return
  print(recall_table.write(pathlib.Path(_RESULTS.value or root), found))


def sweep(root: pathlib.Path, curves: Curves) -> None:
  """Trains what is not finished: width by width every mixer, then again those with more seeds."""
  try:
    members = [Member(float(r), int(s)) for r in _RATES.value for s in _SEEDS.value]
    more_seeds = [int(s) for s in _MORE_SEEDS.value]
  except ValueError as error:
    raise ConfigError(f'--rates and the seeds: {error}') from error
  if again := {m.seed for m in members} & set(more_seeds):
    raise ConfigError(f'--more_seeds has {min(again)}, which --seeds has too; expected others')
  late = deadline(_BUDGET.value)

  def find(first, is_second):
    """A run; None while its learning rate is not known."""
    if not is_second:
      return first
    known = curves.of(first.folder, first.columns, first.members)
    if known is None:
      return None
    chosen = recall_table.best_rate(last(known))
    return make(first.config, first.columns, [Member(chosen, seed) for seed in more_seeds])

  def make(config, columns, members):
    folder = root / f'{columns["mixer"]}_d{columns["width"]}_{digest(members, _SET.value)}'
    return Run(folder, config, tuple(members), columns)

  plan = []
  for width in _WIDTHS.value:
    configs = {mixer: _config(mixer, width) for mixer in _MIXERS.value}  # a wrong one fails at once
    runs = [
      make(config, _columns(mixer, width, config), members) for mixer, config in configs.items()
    ]
    for is_second in (False, True) if more_seeds else (False,):
      plan += [functools.partial(find, first, is_second) for first in runs]
  together = Together(_EVALUATE_EVERY.value, late)
  train(plan, curves, together if _TOGETHER.value else functools.partial(_one_by_one, late), late)


def _columns(mixer, width, config) -> dict[str, object]:
  return {
    'task': config.data.path, 'mixer': mixer, 'width': int(width),
    'state_bytes': state_bytes(config),
  }  # fmt: skip


def state_bytes(config) -> int:
  """Bytes of the recurrent states of one sequence in float32; 0 for attention."""
  model = LanguageModel(model_config(config, 8192))
  caches = jax.eval_shape(lambda: model.init_cache(1, 8))
  states = [cache.state for cache in caches if hasattr(cache, 'state')]
  return sum(4 * x.size for x in jax.tree.leaves(states))


def _one_by_one(late, run, later) -> tuple[list[dict], bool]:
  """A trainer: the members in the training loop."""
  del later
  rows = []
  for member in run.members:
    if late():
      return rows, False
    name = f'{member.learning_rate:g}_seed{member.seed}'
    row = train_alone(run.config, member, run.folder / name)
    if row is None:
      return rows, False
    rows.append(row)
  return rows, True


def _config(mixer: str, width: str):
  config = with_overrides(functools.partial(CONFIG['get_config'], f'{mixer},{width}'), _SET.value)
  if config.data.format != 'synthetic' or config.data.path not in TASKS:
    raise ConfigError(f'data.path is {config.data.path!r}; expected one of {", ".join(TASKS)}')
  return config


if __name__ == '__main__':
  run(main)
