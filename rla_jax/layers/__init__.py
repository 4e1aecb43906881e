"""Flax Linen layers: the two of the paper, their baselines, and what they are made of."""

from rla_jax.layers.cache import AttentionCache, RecurrentCache
from rla_jax.layers.norms import RMSNorm
from rla_jax.layers.residual import RecurrentLayer, ResidualDeltaNet, ResidualLinearAttention
from rla_jax.layers.settings import Settings

__all__ = [
  'AttentionCache',
  'RMSNorm',
  'RecurrentCache',
  'RecurrentLayer',
  'ResidualDeltaNet',
  'ResidualLinearAttention',
  'Settings',
]
