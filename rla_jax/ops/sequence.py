"""Sequences that are split over devices: the operators along a mesh axis, inside `shard_map`.

The tokens of a shard map the states that come into it to those that leave it. The base state's map
S -> M S + F is known at once. That of the residual state is affine too, but only for given
residuals, which need the true base state. So there are two dependent exchanges, and transposing
them makes two in the backward pass:

    1. M and F of the base state of every shard; each shard composes those before it: its S0.
    2. The same for R, from a run with the true S0 and R0 = 0, whose final R is F.

What R0 adds to the outputs is linear in it, and one more read-out. The exchanged arrays have the
size of states; no token leaves its device. Every run is a call of the public operators, so any
implementation serves.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rla_jax.ops.api import residual_delta_rule, residual_linear_attention
from rla_jax.ops.inputs import accumulator_dtype
from rla_jax.ops.state import ResidualState
from rla_jax.shapes import Array, Float, Gate, LogDecay, Queries, Segments, Values

# Up to here every device gathers all summaries; beyond, a scan of logarithmic depth is less.
_GATHERED_SHARDS = 8


class ShardMap(NamedTuple):
  """What the tokens of one or more neighbouring shards do to a state: S -> M S + F.

  Attributes:
    through: [B, 1, 1, 1], False if a document starts in them, so that nothing gets through.
    matrix: M [B, H, K, K]; for the additive update its diagonal [B, H, K or 1, 1].
    offset: F [B, H, K, V].
  """

  through: Array
  matrix: Array
  offset: Array


def split_over_sequence(
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
  readout: str = 'gated',
  **options,
) -> tuple[Values, ResidualState]:
  """An operator on a sequence whose tokens are split over a mesh axis, in order.

  Call it inside `jax.shard_map` over `axis_name`. Differentiable, as the operators are.

  Args:
    operator: `residual_linear_attention` or `residual_delta_rule`.
    q: this shard's tokens, as all token arrays: [B, T / shards, G, K].
    k: keys.
    v: values [B, T / shards, H, V].
    log_decay: as the operator takes it.
    beta: as the operator takes it.
    gamma: as the operator takes it.
    axis_name: the mesh axis along which the sequence is split.
    initial_state: states before the whole sequence, the same on every shard.
    segment_ids: this shard's ids; documents may start and end anywhere.
    readout: as the operator takes it.
    **options: `clip`, `chunk_size`, `implementation` and `finite`, as the operator takes them.

  Returns:
    o of this shard's tokens, and the states after the whole sequence, the same on every shard.

  Raises:
    ValueError: a shard without tokens, another operator, or as the operator raises.
  """
  if operator not in (residual_delta_rule, residual_linear_attention):
    raise ValueError(f'operator is {operator!r}; expected one of the two operators of rla_jax.ops')
  if v.shape[1] == 0:
    raise ValueError(f'v has shape {v.shape}; expected at least one token on every shard')
  dtype = accumulator_dtype(v.dtype)
  B, T, H, V = v.shape
  K = k.shape[-1]
  if log_decay is None:
    log_decay = jnp.zeros((B, T, H), dtype)
  if beta is None:
    beta = jnp.ones((B, T, H), dtype)
  if initial_state is None:
    zeros = jnp.zeros((B, H, K, V), dtype)
    initial_state = ResidualState(zeros, None if gamma is None else zeros)
  continued_B = jnp.ones(B, bool)
  through_B = jnp.ones(B, bool)
  if segment_ids is not None:
    continued_B = _continues(segment_ids, axis_name)
    through_B = continued_B & (segment_ids == segment_ids[:, :1]).all(axis=1)
  continued, through = continued_B[:, None, None, None], through_B[:, None, None, None]

  def run(v, rate, gamma, state):
    return operator(
      q, k, v, log_decay, rate, gamma, initial_state=state, segment_ids=segment_ids,
      readout=readout, **options,
    )  # fmt: skip

  def transition(rate):
    """M of this shard for a write rate."""
    if operator is residual_linear_attention:
      # Where nothing gets through, a document may hold a NaN, which is nobody else's gradient.
      kept = jnp.where(through_B.reshape(B, *[1] * (log_decay.ndim - 1)), log_decay, 0)
      total = jnp.exp(kept.astype(dtype).sum(axis=1))
      return total[..., None, None] if log_decay.ndim == 3 else total[..., None]
    unit = jnp.broadcast_to(jnp.eye(K, dtype=dtype), (B, H, K, K))
    _, state = run(jnp.zeros((B, T, H, K), v.dtype), rate, None, ResidualState(unit, None))
    return state.base

  def incoming(shard, initial):
    """The state before this shard."""
    return jnp.where(continued, _exclusive(shard, initial, axis_name), 0)

  nothing = jnp.zeros((B, H, K, V), dtype)
  _, alone = run(v, beta, None, ResidualState(nothing, None))
  base = incoming(ShardMap(through, transition(beta), alone.base), initial_state.base)
  if gamma is None:
    o, state = run(v, beta, None, ResidualState(base, None))
    return o, _last(state, axis_name)
  o, state = run(v, beta, gamma, ResidualState(base, nothing))
  shard = ShardMap(through, transition(gamma), state.residual)
  residual = incoming(shard, initial_state.residual)
  # What the incoming residual state adds, alone: a base model that writes nothing.
  added, _ = run(jnp.zeros_like(v), gamma, None, ResidualState(residual, None))
  if readout == 'gated':
    added = gamma[..., None] * added.astype(dtype)
  o = (o.astype(dtype) + added.astype(dtype)).astype(v.dtype)
  return o, _last(ResidualState(state.base, _advance(shard, residual)), axis_name)


def compose(first: ShardMap, second: ShardMap) -> ShardMap:
  """`second` after `first`. Associative; what does not get through is dropped, NaN or not."""
  return ShardMap(
    first.through & second.through, _carry(second, first.matrix), _advance(second, first.offset)
  )


def _advance(shards: ShardMap, state: Array) -> Array:
  """The state behind the shards."""
  return _carry(shards, state) + shards.offset


def _carry(shards: ShardMap, state: Array) -> Array:
  """What is left of a state behind the shards. Zero factors, so that no NaN gets a gradient."""
  matrix, state = (jnp.where(shards.through, x, 0) for x in (shards.matrix, state))
  if matrix.shape[-1] == 1:
    return matrix * state
  return jnp.matmul(matrix, state, precision='highest')


def _exclusive(
  own: ShardMap, initial: Float[Array, 'B H K V'], axis_name: str
) -> Float[Array, 'B H K V']:
  """The state before this shard: the maps of all shards before it, applied to the initial one."""
  count, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
  if count <= _GATHERED_SHARDS:
    gathered = jax.lax.all_gather(own, axis_name)
    state = initial
    for i in range(count - 1):
      one = jax.tree.map(lambda x, i=i: x[i], gathered)
      # Zeros where the result is dropped: a NaN state would give the later shards' maps a gradient.
      after = _advance(one, jnp.where(i < index, state, 0))
      state = jnp.where(i < index, after, state)
    return state
  distance = 1
  while distance < count:
    earlier = _from_earlier(own, distance, axis_name)
    joined = compose(earlier, own)
    own = jax.tree.map(
      lambda new, old, d=distance: jnp.where(index >= d, new, old), joined, own
    )
    distance *= 2
  before = _from_earlier(own, 1, axis_name)
  return jnp.where(index == 0, initial, _advance(before, initial))


def _from_earlier(x, distance: int, axis_name: str):
  """x of the shard `distance` before; zeros where there is none."""
  count = jax.lax.axis_size(axis_name)
  pairs = [(i, i + distance) for i in range(count - distance)]
  return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis_name, pairs), x)


def _continues(segment_ids: Segments, axis_name: str) -> Array:
  """Whether the first token [B] is of the document that the token before it belongs to."""
  last_B = _from_earlier(segment_ids[:, -1], 1, axis_name)
  return (last_B == segment_ids[:, 0]) | (jax.lax.axis_index(axis_name) == 0)


def _last(state: ResidualState, axis_name: str) -> ResidualState:
  """The last shard's state, on every shard."""
  is_last = jax.lax.axis_index(axis_name) == jax.lax.axis_size(axis_name) - 1
  return jax.tree.map(
    lambda s: jax.lax.psum(jnp.where(is_last, s, jnp.zeros_like(s)), axis_name), state
  )
