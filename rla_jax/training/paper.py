"""Settings that the paper's 1.5B models share, for the files in `configs/`."""

from ml_collections import ConfigDict

from rla_jax.models import PRESETS
from rla_jax.training.config import get_config

_TOKENS = 100_000_000_000
_WARMUP_TOKENS = 500_000_000


def get_paper_config(preset: str) -> ConfigDict:
  """A model of the paper, to be trained on 100B tokens of text as the paper trains it.

  The paper states neither tokenizer nor sequence length; 4096 tokens a row is our choice.

  Args:
    preset: name in `rla_jax.models.PRESETS`.

  Reference:
    Lai, Kang, Lu, Lin, Zhao: Enhancing Linear Attention with Residual Learning, arXiv:2509.25223.
  """
  c = get_config()
  c.model.update(PRESETS[preset].to_dict())

  c.data.path = 'data/slimpajama/train/*.jsonl.gz'
  c.data.validation_path = 'data/slimpajama/validation/*.jsonl.gz'
  c.data.tokenizer = 'data/slimpajama/tokenizer.json'
  c.data.cache_dir = 'data/slimpajama/cache'
  c.data.seq_len = 4096
  c.data.batch_size = 1024

  tokens = c.data.seq_len * c.data.batch_size
  c.steps = round(_TOKENS / tokens)
  c.accumulate = None  # By device_tokens: 8 parts on 8 devices, one on 64 and more.
  c.optimizer.learning_rate = 3e-4
  c.optimizer.final_learning_rate = 3e-5
  c.optimizer.warmup_steps = round(_WARMUP_TOKENS / tokens)
  c.optimizer.weight_decay = 0.1
  c.optimizer.clip_norm = 1.0

  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.eval_tokens = 10_000_000
  c.eval_every = 500
  c.checkpoint_every = 250
  c.keep_every = 5000
  return c
