"""Transformer with 4 key and value groups, 1.51 B parameters, 100 B tokens.

Reproduces: the paper's Transformer: WikiText perplexity 17.33, LAMBADA perplexity 19.53.
Command: python experiments/train.py --config=configs/transformer_1p5b.py --workdir=runs/transformer
  --config.data.path, validation_path and tokenizer say where your text is.
Hardware: meant for 8 GPUs of 80 GB or more, or a TPU slice (docs/training.md has meshes for three);
  --config.device_tokens trades memory for speed.
Wall time: not yet run.
Result: not yet run.
"""

from rla_jax.training.paper import get_paper_config


def get_config():
  """The paper's Transformer baseline."""
  return get_paper_config('transformer_1p5b')
