"""Evaluates a trained model: loss on held-out text, or the suites of rla_jax.evaluation.

  python experiments/evaluate.py --workdir=runs/quickstart
  python experiments/evaluate.py --workdir=runs/quickstart --path='other_text/*.txt'
  python experiments/evaluate.py --workdir=runs/mine --suite=perplexity,commonsense --data_dir=data

Without --path: the documents that the run held out. Without --suite: long documents are cut into
the run's sequences, each predicted from its own tokens only; prints one line of JSON. With --suite:
whole documents, the state carried; prints a table beside published numbers, and leaves it in
--output with JSON, CSV and figures. docs/evaluation.md describes the suites and the sets they read:

  perplexity       loss on any text, WikiText-2, LAMBADA
  commonsense      multiple choice, through the language model evaluation harness
  recall           answers out of a document, likewise
  needle           a needle in a haystack, by length and depth
  mqar             associative recall: of a checkpoint that was trained on it
  state_tracking   parity, modular arithmetic, permutations: likewise
  throughput       tokens a second and memory against length
"""

import json
import pathlib

from absl import flags

from rla_jax.evaluation import Settings, run_suites
from rla_jax.evaluation.run import parse_lengths
from rla_jax.training.command_line import run
from rla_jax.training.trained import evaluate_run

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the training run.', required=True)
_PATH = flags.DEFINE_string('path', None, 'File, folder or glob to evaluate on instead.')
_MAX_TOKENS = flags.DEFINE_integer(
  'max_tokens', None, 'Evaluate whole documents up to so many tokens; default: all.', lower_bound=1
)
_SUITE = flags.DEFINE_list(
  'suite', [], 'Suites or single tasks, keys or values of rla_jax.evaluation.SUITES.'
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Folder of the evaluation sets.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the results; default: in the workdir.')
_WINDOW = flags.DEFINE_integer(
  'window', None, 'Tokens of text that the model sees at a time; default: whole documents.',
  lower_bound=1,
)  # fmt: skip
_STRIDE = flags.DEFINE_integer(
  'stride', None, 'Tokens between windows; default: the window.', lower_bound=1
)
_CHUNK = flags.DEFINE_integer('chunk', 2048, 'Tokens of one call of the model.', lower_bound=1)
_BATCH_TOKENS = flags.DEFINE_integer('batch_tokens', 16384, 'Tokens of a batch.', lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 16, 'Prompts that are continued at a time.', lower_bound=1
)
_LENGTHS = flags.DEFINE_list('lengths', None, 'Tokens, in needle and throughput; default: theirs.')
_MIXERS = flags.DEFINE_list('mixers', None, 'Layers that throughput compares; default: the run\'s.')
_LIMIT = flags.DEFINE_integer(
  'limit', None, 'First samples or documents of each task; default: all.', lower_bound=1
)


def main(_):
  """Evaluates as the flags say."""
  if _SUITE.value:
    return suites()
  step, evaluation = evaluate_run(_WORKDIR.value, _PATH.value, _MAX_TOKENS.value)
  print(json.dumps({
    'step': step,
    'loss': evaluation.loss,
    'perplexity': evaluation.perplexity,
    'bits_per_byte': evaluation.bits_per_byte if evaluation.bytes else None,  # ids are no text
    'tokens': evaluation.tokens,
    'bytes': evaluation.bytes,
  }))  # fmt: skip
  return 0


def suites() -> int:
  """Runs the suites, prints the table and what was skipped."""
  output = pathlib.Path(_OUTPUT.value or f'{_WORKDIR.value}/evaluation').expanduser()
  settings = Settings(
    data_dir=_DATA_DIR.value, path=_PATH.value, window=_WINDOW.value, stride=_STRIDE.value,
    chunk=_CHUNK.value, batch_tokens=_BATCH_TOKENS.value, batch_size=_BATCH_SIZE.value,
    limit=_LIMIT.value, lengths=_LENGTHS.value and parse_lengths(_LENGTHS.value),
    mixers=_MIXERS.value and tuple(_MIXERS.value),
  )  # fmt: skip
  _, skipped = run_suites(_WORKDIR.value, _SUITE.value, output, settings)
  print((output / 'results.md').read_text())
  for task, reason in skipped.items():
    print(f'skipped {task}: {reason}')
  return 0


if __name__ == '__main__':
  run(main)
