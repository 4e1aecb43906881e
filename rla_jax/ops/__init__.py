"""The operators: residual linear attention and the residual delta rule, as pure functions."""

from rla_jax.ops.api import (
  explain_implementations,
  residual_delta_rule,
  residual_delta_rule_step,
  residual_linear_attention,
  residual_linear_attention_step,
  select_implementation,
  states_at,
)
from rla_jax.ops.dispatch import IMPLEMENTATIONS
from rla_jax.ops.heads import split_over_heads
from rla_jax.ops.sequence import split_over_sequence
from rla_jax.ops.state import ResidualState

__all__ = [
  'IMPLEMENTATIONS',
  'ResidualState',
  'explain_implementations',
  'residual_delta_rule',
  'residual_delta_rule_step',
  'residual_linear_attention',
  'residual_linear_attention_step',
  'select_implementation',
  'split_over_heads',
  'split_over_sequence',
  'states_at',
]
