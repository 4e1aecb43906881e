"""Residual Delta Net (RDN), 1.55 B parameters, 100 B tokens.

Reproduces: the paper's RDN: WikiText perplexity 16.57, LAMBADA perplexity 14.93.
Command: python experiments/train.py --config=configs/rdn_1p5b.py --workdir=runs/rdn
  --config.data.path, validation_path and tokenizer say where your text is.
Hardware: meant for 8 GPUs of 80 GB or more, or a TPU slice (docs/training.md has meshes for three);
  --config.device_tokens trades memory for speed.
Wall time: not yet run.
Result: not yet run.
"""

from rla_jax.training.paper import get_paper_config


def get_config():
  """The paper's RDN."""
  return get_paper_config('rdn_1p5b')
