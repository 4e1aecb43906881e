"""Flax Linen layers: the two of the paper, their baselines, and what they are made of."""

from rla_jax.layers.attention import Attention, SlidingWindowAttention
from rla_jax.layers.base_conv import BaseConv, Identity
from rla_jax.layers.baselines import (
  GLA,
  DeltaNet,
  GatedDeltaNet,
  KimiDeltaAttention,
  Mamba2,
  RetNet,
  SimpleGLA,
  TwoStateDeltaNet,
)
from rla_jax.layers.cache import AttentionCache, RecurrentCache
from rla_jax.layers.norms import LayerNorm, RMSNorm
from rla_jax.layers.registry import LAYERS, make
from rla_jax.layers.residual import RecurrentLayer, ResidualDeltaNet, ResidualLinearAttention
from rla_jax.layers.settings import Settings

__all__ = [
  'Attention',
  'AttentionCache',
  'BaseConv',
  'DeltaNet',
  'GLA',
  'GatedDeltaNet',
  'Identity',
  'KimiDeltaAttention',
  'LAYERS',
  'LayerNorm',
  'Mamba2',
  'RMSNorm',
  'RecurrentCache',
  'RecurrentLayer',
  'ResidualDeltaNet',
  'ResidualLinearAttention',
  'RetNet',
  'Settings',
  'SimpleGLA',
  'SlidingWindowAttention',
  'TwoStateDeltaNet',
  'make',
]
