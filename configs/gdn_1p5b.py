"""Gated DeltaNet (GDN), 1.55 B parameters, 100 B tokens: RDN's base, without residual.

Reproduces: the paper's GDN: WikiText perplexity 17.27, LAMBADA perplexity 15.76.
Command: python experiments/train.py --config=configs/gdn_1p5b.py --workdir=runs/gdn
  --config.data.path, validation_path and tokenizer say where your text is.
Hardware: meant for 8 GPUs of 80 GB or more, or a TPU slice (docs/training.md has meshes for three);
  --config.device_tokens trades memory for speed.
Wall time: not yet run.
Result: not yet run.
"""

from rla_jax.training.paper import get_paper_config


def get_config():
  """The paper's Gated DeltaNet baseline."""
  return get_paper_config('gdn_1p5b')
