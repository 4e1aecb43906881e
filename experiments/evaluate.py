"""Loss, perplexity and bits per byte of a trained model on held-out text.

  python experiments/evaluate.py --workdir=runs/quickstart
  python experiments/evaluate.py --workdir=runs/quickstart --path='other_text/*.txt'

Without --path: the documents that the run held out. Long documents are cut into the run's
sequences, each predicted from its own tokens only. Prints one line of JSON.
"""

import json

from absl import flags

from rla_jax.training.command_line import run
from rla_jax.training.trained import evaluate_run

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the training run.', required=True)
_PATH = flags.DEFINE_string('path', None, 'File, folder or glob to evaluate on instead.')
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'Evaluate whole documents up to so many tokens; default: all.', lower_bound=1
)


def main(_):
  """Evaluates as the flags say."""
  step, evaluation = evaluate_run(_WORKDIR.value, _PATH.value, _MAX_TOKENS.value)
  print(json.dumps({
    'step': step,
    'loss': evaluation.loss,
    'perplexity': evaluation.perplexity,
    'bits_per_byte': evaluation.bits_per_byte,
    'tokens': evaluation.tokens,
    'bytes': evaluation.bytes,
  }))  # fmt: skip


if __name__ == '__main__':
  run(main)
