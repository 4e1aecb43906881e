"""The language model evaluation harness's own command line, with this library's models and sets.

  python -m rla_jax.evaluation.lm_eval --workdir runs/mine --data_dir data --tasks arc_easy,piqa
  python -m rla_jax.evaluation.lm_eval --data_dir data --model rla_jax \\
      --model_args workdir=runs/mine,chunk=1024 --tasks squad --limit 100 --log_samples ...

All flags are the harness's, but for two: `--workdir` is short for the model and its argument, and
the sets in the folder `--data_dir` become tasks, in place of the harness's own of the same name
(`rla_jax.evaluation.local_tasks` lists them). A set that cannot be used is no task, and an error if
`--tasks` names it.
"""

import argparse
import fnmatch
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence

from rla_jax.data import DataError
from rla_jax.evaluation import local_tasks


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the harness; errors that a user can act on are one line.

  Args:
    arguments: of the command line; None: those of this process.
  """
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument('--workdir')
  parser.add_argument('--data_dir')
  ours, rest = parser.parse_known_args(arguments)
  if {'-h', '--help'} & set(rest):
    print(__doc__)  # the harness prints its own behind it
  elif rest[:1] not in (['ls'], ['validate']):
    _check(ours, rest)
  if importlib.util.find_spec('lm_eval') is None:
    sys.exit("error: lm_eval is not installed: pip install -e '.[eval]'")
  from lm_eval.__main__ import cli_evaluate

  from rla_jax.evaluation import harness
  from rla_jax.training.errors import TrainingError

  harness.go_offline()
  harness.stay_in_one_process()
  if ours.workdir is not None:
    rest += ['--model', 'rla_jax', '--model_args', f'workdir={ours.workdir}']
  with tempfile.TemporaryDirectory() as folder:
    try:
      if ours.data_dir is not None:
        write_tasks(folder, ours.data_dir, rest)
        rest += ['--include_path', folder]
      sys.argv = ['lm_eval', *rest]
      cli_evaluate()
    except (DataError, TrainingError) as error:
      sys.exit(f'error: {error}')
    except ValueError as error:
      if not str(error).startswith('Tasks not found'):
        raise
      sys.exit(f'error: {error}; `ls tasks` lists those of the harness')


def write_tasks(
  folder: str | os.PathLike, data_dir: str | os.PathLike, arguments: Sequence[str]
) -> None:
  """Writes the tasks that --tasks names; all, if it names others too or is not given.

  Names on stderr what is not written.

  Args:
    folder: where to; exists.
    data_dir: folder of the sets.
    arguments: of the harness.

  Raises:
    DataError: a set that is named cannot be used: the harness would take its own instead.
  """
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  parser.add_argument('--tasks', '-t', nargs='+', action='extend', default=[])
  given = [name for word in parser.parse_known_args(arguments)[0].tasks for name in word.split(',')]
  named = {name: fnmatch.filter(local_tasks.TASKS, name) for name in given}
  ours = [task for task in local_tasks.TASKS if any(task in tasks for tasks in named.values())]
  all_ours = bool(named) and all(named.values())
  _, absent, damaged = local_tasks.write(folder, data_dir, ours if all_ours else None)
  for task, reason in (absent | damaged).items():
    if task in damaged and task in ours:
      raise DataError(reason)
    print(f'no task {task}: {reason}', file=sys.stderr)


def _check(ours: argparse.Namespace, rest: Sequence[str]) -> None:
  """What the harness would answer with a traceback."""
  given = {word.partition('=')[0] for word in rest}
  if ours.workdir is None and not given & {'--model', '-M', '--config', '-C'}:
    sys.exit('error: neither --workdir nor --model is given')
  if not given & {'--tasks', '-t', '--config', '-C'}:
    sys.exit('error: no --tasks are given')


if __name__ == '__main__':
  main()
