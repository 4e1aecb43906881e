"""Checks on the devices at hand that a run which is killed ends where an undisturbed one does.

  python experiments/check_resume.py --config=configs/quickstart.py \\
      --config.steps=60 --config.checkpoint_every=5 --kills=3
  XLA_FLAGS=--xla_gpu_deterministic_ops=true python experiments/check_resume.py ...   # on a GPU

Trains once from end to end, and once with kill -9 at random steps and the same command after it.
Then every number of both states, and the metrics of every step, have to be the same bits. Exit
status 1 and a list if they are not.
"""

import pathlib
import random
import sys
import tempfile

import jax
from absl import flags
from ml_collections import config_flags

from rla_jax.training import ConfigError, resume
from rla_jax.training.command_line import FAILED, define_config, run
from rla_jax.training.config import check

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'New folder of the two runs; default: a temporary one.'
)
_KILLS = flags.DEFINE_integer('kills', 1, 'How often the second run is killed.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the steps at which it is.')
_TRAIN = pathlib.Path(__file__).resolve().with_name('train.py')


def main(_):
  """Trains twice and compares."""
  jax.config.update('jax_platforms', 'cpu')  # The devices belong to the runs.
  check(_CONFIG.value)
  resume.check_kills(_CONFIG.value, _KILLS.value)
  if _WORKDIR.value is not None:
    return _check(pathlib.Path(_WORKDIR.value).absolute())
  with tempfile.TemporaryDirectory() as folder:
    return _check(pathlib.Path(folder))


def _check(folder) -> int:
  config, rng = _CONFIG.value, random.Random(_SEED.value)
  whole, killed = folder / 'whole', folder / 'killed'
  if folder.exists() and any(folder.iterdir()):
    raise ConfigError(f"--workdir is '{folder}', which is not empty; expected a new folder")
  flag = flags.FLAGS['config']
  # The same config, and one short evaluation at the end.
  overrides = {
    **config_flags.get_override_values(flag), 'eval_every': config.steps, 'eval_tokens': 1
  }  # fmt: skip
  command = [
    sys.executable, str(_TRAIN), f'--config={flag.config_filename}',
    *(f'--config.{key}={value}' for key, value in overrides.items()),
  ]  # fmt: skip
  resume.train(command, whole)
  print(f'trained {config.steps} steps', flush=True)
  for number in range(_KILLS.value):
    step = resume.train_and_kill(command, killed, config.checkpoint_every, rng)
    print(f'killed at step {step}, {number + 1} of {_KILLS.value}', flush=True)
  resume.train(command, killed)
  print(f'went on from steps {resume.starts(killed)[1:]}', flush=True)
  found = resume.differences(whole, killed)
  print('\n'.join(found) or 'the same bits: parameters, optimiser, metrics of every step')
  return FAILED if found else 0


if __name__ == '__main__':
  run(main)
