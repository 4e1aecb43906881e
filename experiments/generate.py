"""Samples text from a trained model.

  python experiments/generate.py --workdir=runs/quickstart --prompt='class ' --temperature=0.7

The prompt is read in chunks; then a token costs the same time and memory however long the text is
(recurrent layers only: attention layers keep what they have read).
"""

from absl import flags

from rla_jax.training.command_line import run
from rla_jax.training.trained import continue_text

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the training run.', required=True)
_PROMPT = flags.DEFINE_string('prompt', '', 'Text to continue; none starts a document.')
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.8, 'Divides the logits; 0 takes the most probable token.', lower_bound=0.0
)
_TOP_K = flags.DEFINE_integer(
  'top_k', None, 'Sample from the k most probable tokens only.', lower_bound=1
)
_TOP_P = flags.DEFINE_float(
  'top_p', None, 'Sample from the most probable tokens that reach this probability together.'
)
flags.register_validator(
  'top_p', lambda p: p is None or 0 < p <= 1, 'expected a number above 0 and at most 1'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the random numbers; the same seed, the same text.')
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  'max_new_tokens', 256, 'Tokens to make; fewer if the document ends.', lower_bound=1
)


def main(_):
  """Prints the prompt and what the model puts behind it."""
  text = continue_text(
    _WORKDIR.value, _PROMPT.value, _MAX_NEW_TOKENS.value, temperature=_TEMPERATURE.value,
    top_k=_TOP_K.value, top_p=_TOP_P.value, seed=_SEED.value,
  )  # fmt: skip
  print(_PROMPT.value + text)


if __name__ == '__main__':
  run(main)
