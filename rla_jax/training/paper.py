"""Settings that the paper's 1.5B models share, for the files in `configs/`."""

from ml_collections import ConfigDict

from rla_jax.training.config import get_config

_TOKENS = 100_000_000_000
_WARMUP_TOKENS = 500_000_000


def get_paper_config(layer: str, **options) -> ConfigDict:
  """A 1.5B model on 100B tokens of text: model and optimiser as in the paper.

  The paper states neither tokenizer nor sequence length. A vocabulary of about 100,000, with
  embedding and head apart, gives its parameter counts; 4096 tokens a row is our choice.

  Args:
    layer: the mixer of all 16 blocks, by its name in `rla_jax.layers.registry`.
    **options: attributes of the layer.

  Reference:
    Lai, Kang, Lu, Lin, Zhao: Enhancing Linear Attention with Residual Learning, arXiv:2509.25223.
  """
  c = get_config()
  c.model.vocab_size = 100_352
  c.model.num_layers = 16
  c.model.model_dim = 2048
  c.model.ffn_dim = 8192
  c.model.num_heads = 16
  c.model.head_dim = 128
  c.model.pattern = (layer,)
  if options:
    c.model.layer_options = {layer: options}
  c.model.init_std = 0.006
  c.model.loss_chunk = 512

  c.data.path = 'data/slimpajama/train/*.jsonl.gz'
  c.data.validation_path = 'data/slimpajama/validation/*.jsonl.gz'
  c.data.tokenizer = 'data/slimpajama/tokenizer.json'
  c.data.cache_dir = 'data/slimpajama/cache'
  c.data.seq_len = 4096
  c.data.batch_size = 1024

  tokens = c.data.seq_len * c.data.batch_size
  c.steps = round(_TOKENS / tokens)
  c.accumulate = 8
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
