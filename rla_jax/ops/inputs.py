"""Canonical form of a call: what every implementation receives."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rla_jax.ops.state import ResidualState
from rla_jax.shapes import Gate, LogDecay, Queries, Segments, Values

Update = Literal['additive', 'delta']
Readout = Literal['gated', 'sum']


class Inputs(NamedTuple):
  """Arrays of a call, defaults filled in. `gamma` is None for a base model, `segments` without ids.

  Gates are float32 (float64 for float64 values), as are both states. `segments` counts documents
  from 0 along T, so the initial state belongs to segment 0.
  """

  q: Queries
  k: Queries
  v: Values
  log_decay: LogDecay
  beta: Gate
  gamma: Gate | None
  state: ResidualState
  segments: Segments | None


@dataclasses.dataclass(frozen=True)
class Options:
  """Static part of a call.

  Attributes:
    update: 'additive' (3a, 4a of the recurrence) or 'delta' (3b, 4b).
    clip: bound of the residual, or None.
    readout: 'gated' or 'sum'; without meaning for a base model.
    chunk_size: tokens of a chunk, or None for the implementation's own choice.
    finite: q, k and v are known to be.
  """

  update: Update
  clip: float | None = 1.0
  readout: Readout = 'gated'
  chunk_size: int | None = None
  finite: bool = False


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """dtype of states and gates: float64 for float64 values, else float32."""
  return jnp.dtype(jnp.float64) if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def repeat_heads(x: jax.Array, heads: int, axis: int = -2) -> jax.Array:
  """Gives value head h the query or key head h // (heads // groups)."""
  groups = x.shape[axis]
  return x if groups == heads else jnp.repeat(x, heads // groups, axis=axis)


def vary_alike(inputs: Inputs) -> Inputs:
  """Within `shard_map`: makes all arrays vary over the mesh axes over which any of them does.

  A scan's carry must vary as its body's result does, so a state of zeros made here, or an argument
  that is the same on all devices, has to be marked.
  """
  leaves, tree = jax.tree.flatten(inputs)
  varying = [jax.typeof(x).manual_axis_type.varying for x in leaves]
  union = frozenset().union(*varying)

  def vary(x, own):
    missing = tuple(sorted(union - own))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return tree.unflatten(map(vary, leaves, varying))
