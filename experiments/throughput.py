"""Tokens a second and memory of a model against length: training step, prefill and decode.

  python experiments/throughput.py --config=configs/quickstart.py --output=/tmp/throughput \\
      --lengths=512,1024
  python experiments/throughput.py --config=configs/transformer_1p5b.py --output=results \\
      --mixers=rla,rdn,sgla,gdn,attention --lengths=2048,8192,32768,131072 --chunk=32768

The model has random parameters. --mixers puts one layer after the other in place of all those of
the config, with the config's options for it: the paper's models are one another's but for that, and
transformer_1p5b has the heads of its attention too. Writes throughput.csv and, for each of --kinds,
throughput_KIND.png and memory_KIND.png. The same command again measures what is missing; --budget
compiles nothing more after so many seconds.
"""

import math
import pathlib

from absl import flags

from rla_jax.evaluation import throughput
from rla_jax.evaluation.results import read_rows
from rla_jax.evaluation.run import parse_lengths
from rla_jax.training.command_line import define_config, run
from rla_jax.training.config import check, model_config

_CONFIG = define_config()
_OUTPUT = flags.DEFINE_string('output', None, 'Folder of the results.', required=True)
_MIXERS = flags.DEFINE_list('mixers', None, 'Layers to compare; default: those of the config.')
_LENGTHS = flags.DEFINE_list('lengths', list(map(str, throughput.LENGTHS)), 'Tokens of a sequence.')
_BATCH_TOKENS = flags.DEFINE_integer('batch_tokens', 32768, 'Tokens of a batch.', lower_bound=1)
_CHUNK = flags.DEFINE_integer('chunk', 2048, 'Prompt tokens of one call.', lower_bound=1)
_KINDS = flags.DEFINE_list('kinds', list(throughput.KINDS), 'What to measure.')
_BUDGET = flags.DEFINE_float(
  'budget', None, 'Seconds after which nothing more is compiled; the same command goes on.'
)
_FIGURES_ONLY = flags.DEFINE_bool('figures_only', False, 'Only draw the figures of a table again.')
_VOCABULARY = flags.DEFINE_integer(
  'vocab_size', 100_352, 'Tokens of the vocabulary, unless the config says.', lower_bound=1
)


def main(_):
  """Measures as the flags say."""
  check(_CONFIG.value)
  folder = pathlib.Path(_OUTPUT.value)
  folder.mkdir(parents=True, exist_ok=True)
  table = folder / 'throughput.csv'
  known = read_rows(table) if table.exists() else []
  if _FIGURES_ONLY.value:
    throughput.draw(folder, _KINDS.value, known)
    return
  size = _CONFIG.value.model.vocab_size or _VOCABULARY.value
  throughput.measure(
    model_config(_CONFIG.value, size), _CONFIG.value, folder, mixers=_MIXERS.value,
    lengths=parse_lengths(_LENGTHS.value), batch_tokens=_BATCH_TOKENS.value,
    chunk=_CHUNK.value, kinds=_KINDS.value, budget=_BUDGET.value or math.inf,
    known=known, say=lambda line: print(line, flush=True),
  )  # fmt: skip


if __name__ == '__main__':
  run(main)
