"""The paper's models of 1.5 billion parameters, by name.

16 layers of width 2048, SwiGLU of width 8192, 16 heads of 128 (Transformer: 32 heads of 128 over 4
heads of keys and values), embedding and head apart. The paper does not name its tokenizer; about
100,000 tokens give its parameter counts, and 100,352 is cl100k's 100,277 up to a multiple of 128.
"""

from rla_jax.models.config import ModelConfig

_PAPER = {
  'vocab_size': 100_352,
  'num_layers': 16,
  'model_dim': 2048,
  'ffn_dim': 8192,
  'num_heads': 16,
  'head_dim': 128,
  'init_std': 0.006,
  'loss_chunk': 512,
}

PRESETS = {
  'rdn_1p5b': ModelConfig(pattern=('rdn',), **_PAPER),
  'rla_1p5b': ModelConfig(pattern=('rla',), **_PAPER),
  'gdn_1p5b': ModelConfig(pattern=('gdn',), **_PAPER),
  'sgla_1p5b': ModelConfig(pattern=('sgla',), **_PAPER),
  'transformer_1p5b': ModelConfig(
    pattern=('attention',),
    layer_options={'attention': {'num_heads': 32, 'num_kv_heads': 4}},
    **_PAPER,
  ),
}
