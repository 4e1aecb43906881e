"""NNX twins of the paper's layers and of their decode cache."""

from rla_jax.nnx.layers import (
  DecodeCache,
  RecurrentLayer,
  ResidualDeltaNet,
  ResidualLinearAttention,
  load_linen_params,
)

__all__ = [
  'DecodeCache',
  'RecurrentLayer',
  'ResidualDeltaNet',
  'ResidualLinearAttention',
  'load_linen_params',
]
