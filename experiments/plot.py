"""Draws metrics of training runs.

  python experiments/plot.py --runs=runs/a,runs/b --output=loss.png
  python experiments/plot.py --runs=runs/a --output=gates.png \\
      --metrics=train/loss,eval/loss --metrics=gates/alpha/ --metrics=grad_norm/
"""

from absl import flags

from rla_jax.training.command_line import run
from rla_jax.training.plots import draw

_RUNS = flags.DEFINE_list('runs', None, 'Folders of training runs.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Image to write: .png, .svg or .pdf.', required=True)
flags.register_validator(
  'output', lambda path: path is None or path.endswith(('.png', '.svg', '.pdf')),
  'expected a file that ends in .png, .svg or .pdf',
)  # fmt: skip
_METRICS = flags.DEFINE_multi_string(
  'metrics', ['train/loss,eval/loss'],
  'A panel: names as in metrics.jsonl; one that ends in / stands for all that begin with it.',
)  # fmt: skip


def main(_):
  """Draws as the flags say."""
  draw(_RUNS.value, _OUTPUT.value, [panel.split(',') for panel in _METRICS.value])
  print(f'written to {_OUTPUT.value}')


if __name__ == '__main__':
  run(main)
