"""A small Residual Delta Net on the Python standard library's sources, byte by byte, on a CPU."""

from rla_jax.training import get_config as base


def get_config():
  """The config that `make quickstart` trains."""
  c = base()
  c.steps = 400
  c.model.num_layers = 4
  c.model.model_dim = 128
  c.model.ffn_dim = 384
  c.model.num_heads = 2
  c.model.head_dim = 64
  c.model.dtype = 'float32'  # CPUs have no fast bfloat16
  c.model.remat = 'none'
  c.data.seq_len = 256
  c.data.batch_size = 16
  c.optimizer.learning_rate = 3e-3
  c.optimizer.final_learning_rate = 3e-5
  c.optimizer.warmup_steps = 20
  c.log_every = 20
  c.eval_every = 100
  c.eval_tokens = 100_000
  c.checkpoint_every = 100
  return c
