"""Trains a language model.

  python experiments/train.py --config=configs/quickstart.py --workdir=runs/mine
  python experiments/train.py --config=configs/quickstart.py --workdir=runs/text \
      --config.data.path='text/*.txt' --config.steps=2000

The same command again goes on from the newest checkpoint. SIGTERM and Ctrl-C save one and leave.
Every key of the config is listed in rla_jax/training/config.py.
"""

from absl import flags

from rla_jax.training import train_and_evaluate
from rla_jax.training.command_line import define_config, run

_CONFIG = define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: checkpoints, metrics, its config.', required=True
)


def main(_):
  """Trains as the flags say."""
  train_and_evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == '__main__':
  run(main)
