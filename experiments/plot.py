"""Draws loss curves of training runs from their metrics.

  python experiments/plot.py --runs=runs/a,runs/b --output=loss.png
"""

from absl import flags

from rla_jax.training.command_line import run
from rla_jax.training.plots import draw

_RUNS = flags.DEFINE_list('runs', None, 'Folders of training runs.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Image to write: .png, .svg or .pdf.', required=True)
_TRAIN = flags.DEFINE_string('train_metric', 'train/loss', 'Metric drawn as a thin line.')
_EVAL = flags.DEFINE_string('eval_metric', 'eval/loss', 'Metric drawn with points.')


def main(_):
  """Draws as the flags say."""
  draw(_RUNS.value, _OUTPUT.value, _TRAIN.value, _EVAL.value)


if __name__ == '__main__':
  run(main)
