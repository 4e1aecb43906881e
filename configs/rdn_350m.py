"""Residual Delta Net (RDN), 0.34 B parameters, 7 B tokens: a model for one node of GPUs.

Reproduces: nothing of the paper; it is the model of the scaling measurements in docs/training.md.
Command: python experiments/train.py --config=configs/rdn_350m.py --workdir=runs/rdn_350m
  --config.data.path, validation_path and tokenizer say where your text is.
Hardware: meant for one to eight GPUs of 40 GB or more; --config.device_tokens trades memory for
  speed. Fastest of what was measured: --config.model.unroll_layers=True, which takes a minute to
  compile, with --config.model.remat=none on cards of 141 GB (75.9 GiB at 16 rows, which is
  device_tokens) and --config.model.remat=both on those of 80 GB (58.8 GiB at commit 3406ef8).
Wall time: not run to the end. On one H200 (commit 22b3e3e) a step of 16 rows with remat none takes
  360 ms, 182,151 tokens/s, MFU 36.5 %; on two and four, 358,218 and 712,985 tokens/s; the 6.8 B
  tokens would take 10.4, 5.3 and 2.6 hours at these rates.
Result: not yet run.
"""

from rla_jax.training.paper import get_paper_config


def get_config():
  """24 layers of width 1024 and 20 tokens a parameter, in steps of half a million."""
  c = get_paper_config('rdn_1p5b')
  c.model.vocab_size = 32_768
  c.model.num_layers = 24
  c.model.model_dim = 1024
  c.model.ffn_dim = 2048
  c.model.num_heads = 8
  c.data.batch_size = 128
  c.steps = 13_000
  c.optimizer.learning_rate = 6e-4
  c.optimizer.final_learning_rate = 6e-5
  c.optimizer.warmup_steps = 500
  return c
