"""Trains a language model.

  python experiments/train.py --config=configs/quickstart.py --workdir=runs/mine
  python experiments/train.py --config=configs/quickstart.py --workdir=runs/text \\
      --config.data.path='text/*.txt' --config.steps=2000

The same command again goes on from the newest checkpoint. SIGTERM and Ctrl-C save one and leave.
Of many processes each runs the same command: with --distributed on TPU pods and under SLURM, Open
MPI and GKE, else with --coordinator=HOST:PORT --num_processes=N --process_id=I (docs/training.md).
Every key of the config is listed in rla_jax/training/config.py.
"""

from absl import flags

from rla_jax.training import ConfigError, distributed, train_and_evaluate
from rla_jax.training.benchmark import measure_overhead
from rla_jax.training.command_line import define_config, run

distributed.define_flags()
_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: checkpoints, metrics, its config.'
)
_OVERHEAD = flags.DEFINE_integer(
  'measure_overhead', None, 'Only measures, over so many steps, what the loop adds to a step.',
  lower_bound=1,
)


def main(_):
  """Trains as the flags say."""
  distributed.initialize()
  if _OVERHEAD.value is not None:
    print(measure_overhead(_CONFIG.value, _OVERHEAD.value))
    return
  if _WORKDIR.value is None:
    raise ConfigError('--workdir is required (--help lists the flags)')
  train_and_evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
  run(main)
