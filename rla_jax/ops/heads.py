"""Sequences split over devices, the other way: tokens are exchanged for heads, and back.

Two all-to-all exchanges let every device run whole sequences of its share of the heads. They move
every token, 3 T H K numbers and more where `sequence.py` moves states of H K^2, but nothing runs
twice and any operator serves: a second mode, and an oracle for the first.
"""

from collections.abc import Callable

import jax

from rla_jax.ops.inputs import repeat_heads
from rla_jax.ops.state import ResidualState
from rla_jax.shapes import Array, Gate, LogDecay, Queries, Segments, Values


def split_over_heads(
  operator: Callable,
  q: Queries,
  k: Queries,
  v: Values,
  log_decay: LogDecay | None = None,
  beta: Gate | None = None,
  gamma: Gate | None = None,
  *,
  axis_name: str,
  initial_state: ResidualState | None = None,
  segment_ids: Segments | None = None,
  **options,
) -> tuple[Values, ResidualState]:
  """An operator on a sequence whose tokens are split over a mesh axis, in order.

  Takes and returns what `split_over_sequence` does, and has the same value.

  Args:
    operator: `residual_linear_attention`, `residual_delta_rule` or one with their arguments.
    q: this shard's tokens, as all token arrays: [B, T / shards, G, K].
    k: keys.
    v: values [B, T / shards, H, V]; the shards divide H.
    log_decay: as the operator takes it.
    beta: as the operator takes it.
    gamma: as the operator takes it.
    axis_name: the mesh axis along which the sequence is split.
    initial_state: states before the whole sequence, the same on every shard.
    segment_ids: this shard's ids; documents may start and end anywhere.
    **options: as the operator takes them.

  Returns:
    o of this shard's tokens, and the states after the whole sequence, the same on every shard.

  Raises:
    ValueError: heads that the shards do not divide, or as the operator raises.
  """
  heads, shards = v.shape[2], jax.lax.axis_size(axis_name)
  q, k = (shared_heads(x, heads, axis_name) for x in (q, k))
  arguments = (
    None if x is None else tokens_to_heads(x, axis_name)
    for x in (q, k, v, log_decay, beta, gamma)
  )  # fmt: skip
  if initial_state is not None:
    own = heads // shards
    first = jax.lax.axis_index(axis_name) * own
    initial_state = jax.tree.map(
      lambda s: jax.lax.dynamic_slice_in_dim(s, first, own, axis=1), initial_state
    )
  if segment_ids is not None:
    segment_ids = jax.lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
  o, state = operator(*arguments, initial_state=initial_state, segment_ids=segment_ids, **options)
  state = jax.tree.map(lambda s: jax.lax.all_gather(s, axis_name, axis=1, tiled=True), state)
  return heads_to_tokens(o, axis_name), state


def shared_heads(x: Array, heads: int, axis_name: str) -> Array:
  """x [B, T, G, ...] with as many heads as a mesh axis can divide: G, or one for each of `heads`.

  Raises:
    ValueError: the axis does not divide `heads`.
  """
  shards = jax.lax.axis_size(axis_name)
  if heads % shards:
    raise ValueError(
      f'a device has {heads} heads, which mesh axis {axis_name} of size {shards} does not divide; '
      'expected a multiple of it to exchange heads'
    )
  return x if x.shape[2] % shards == 0 else repeat_heads(x, heads, axis=2)


def tokens_to_heads(x: Array, axis_name: str) -> Array:
  """From [B, T / shards, H, ...] to [B, T, H / shards, ...]."""
  return jax.lax.all_to_all(x, axis_name, split_axis=2, concat_axis=1, tiled=True)


def heads_to_tokens(x: Array, axis_name: str) -> Array:
  """From [B, T, H / shards, ...] to [B, T / shards, H, ...]."""
  return jax.lax.all_to_all(x, axis_name, split_axis=1, concat_axis=2, tiled=True)
