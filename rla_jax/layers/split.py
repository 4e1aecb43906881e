"""Layers on a mesh: between its projections, a layer runs on each device's rows, tokens and heads.

XLA places matrix products by itself. It cannot divide a kernel, whose inputs it would gather, nor
a recurrence along its sequence. So under a mesh with the axes of `rla_jax.sharding` the
convolutions and the recurrence run in `shard_map`: rows over data and fsdp, heads over tensor,
tokens over seq. What then crosses the borders of a split sequence:

    convolution   the W - 1 inputs before a shard, from its neighbour
    recurrence    states (`ops.split_over_sequence`)
    attention     all keys and values, to every shard

Layers with `exchange_heads` move tokens instead: each device then has whole sequences of its share
of the heads (`ops.split_over_heads`).

Documents may start anywhere. With a cache the sequence stays whole: few tokens come at a time.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rla_jax import sharding
from rla_jax.layers.conv import next_tail
from rla_jax.ops.heads import heads_to_tokens, shared_heads, tokens_to_heads
from rla_jax.ops.inputs import repeat_heads
from rla_jax.ops.segments import count_segments
from rla_jax.shapes import Array, Float, Segments


@dataclasses.dataclass(frozen=True)
class Division:
  """How [B, T, H, ...] lies on the mesh in force.

  Attributes:
    rows: axes of B, or None.
    seq: axis of T, or None.
    tensor: devices along the axis `tensor`.
  """

  rows: tuple[str, ...] | None
  seq: str | None
  tensor: int

  def heads(self, count: int) -> str | None:
    """The axis of so many heads; None if it does not divide them: then every device has all."""
    return 'tensor' if count % self.tensor == 0 else None

  def head_inputs(
    self,
    function: Callable,
    count: int,
    h: Float[Array, 'B T X'],
    taps: Float[Array, 'W X'] | None,
    segment_ids: Segments | None,
    tail: Float[Array, 'B W-1 X'] | None,
    positions: Array,
  ) -> tuple[Float[Array, 'B T H K'], Array | None]:
    """Runs `function(h, taps, documents, tail, positions)` on every device's part.

    Args:
      function: convolution and what follows it, for whole heads: y, and None or an array [B, T, H].
      count: heads in h.
      h: projections.
      taps: of the convolution, or None.
      segment_ids: documents.
      tail: inputs before the first token, from a cache.
      positions: of the tokens [T].
    """
    heads = self.heads(count)

    def local(h, taps, segment_ids, tail, positions):
      if self.seq is not None and taps is not None and taps.shape[0] > 1:
        tail = _halo(h, taps.shape[0], segment_ids, self.seq)
      documents = None if segment_ids is None else count_segments(segment_ids)
      return function(h, taps, documents, tail, positions)

    tokens = P(self.rows, self.seq)
    return jax.shard_map(
      local,
      in_specs=(
        P(*tokens, heads), P(None, heads), tokens, P(self.rows, None, heads), P(self.seq)
      ),
      out_specs=P(*tokens, heads),
      check_vma=False,
    )(h, taps, segment_ids, tail, positions)  # fmt: skip

  def recur(
    self, function: Callable, heads: dict, gates: tuple, segment_ids, state, keep_state=False
  ):
    """Runs `function(heads, gates, segment_ids, state, axis_name)` on every device's part.

    Args:
      function: the recurrence; returns o [B, T, H, V] and the state.
      heads: q, k and v by name, [B, T, heads, K or V] each.
      gates: log_decay, beta, gamma, each [B, T, H], [B, T, H, K] or None.
      segment_ids: documents.
      state: from a cache, or None.
      keep_state: returns the state after the last token even if none was given.
    """
    count = heads['v'].shape[2]
    heads = dict(heads)
    for name in ('q', 'k'):
      groups = heads[name].shape[2]
      if self.heads(groups) is None and groups > 1:
        heads[name] = repeat_heads(heads[name], count)
    tokens, axis = P(self.rows, self.seq), self.heads(count)

    def split(x):
      # One key head for all value heads is on every device.
      return P(*tokens, axis if x.shape[2] > 1 else None)

    def local(heads, gates, segment_ids, state):
      o, new = function(heads, gates, segment_ids, state, self.seq)
      return o, new if keep_state or state is not None else None

    states = P(self.rows, axis)
    return jax.shard_map(
      local,
      in_specs=(jax.tree.map(split, heads), P(*tokens, axis), tokens, states),
      out_specs=(P(*tokens, axis), states),
      check_vma=False,
    )(heads, gates, segment_ids, state)

  def attend(
    self,
    q: Float[Array, 'B T H K'],
    k: Float[Array, 'B T G K'],
    v: Float[Array, 'B T G K'],
    segment_ids: Segments | None,
    window: int | None,
    implementation: str | None,
  ) -> Float[Array, 'B T H K']:
    """Causal attention of every device's queries to the keys and values of the whole sequence."""

    def local(q, k, v, segment_ids):
      k, v = (_gathered(x, self.seq) for x in (k, v))
      length = q.shape[1]
      start = jax.lax.axis_index(self.seq) * length
      age_TS = start + jnp.arange(length)[:, None] - jnp.arange(k.shape[1])[None]
      visible_TS = age_TS >= 0
      if window is not None:
        visible_TS &= age_TS < window
      mask = visible_TS[None, None]
      if segment_ids is not None:
        documents_BS = count_segments(_gathered(segment_ids, self.seq))
        own_BT = jax.lax.dynamic_slice_in_dim(documents_BS, start, length, axis=1)
        mask &= own_BT[:, None, :, None] == documents_BS[:, None, None, :]
      return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    return self._on_heads(local, q, k, v, segment_ids)

  def attend_by_heads(
    self,
    function: Callable,
    q: Float[Array, 'B T H K'],
    k: Float[Array, 'B T G K'],
    v: Float[Array, 'B T G K'],
    segment_ids: Segments | None,
  ) -> Float[Array, 'B T H K']:
    """Runs `function(q, k, v, segment_ids)` on whole sequences of every device's share of heads."""

    def local(q, k, v, segment_ids):
      k, v = (shared_heads(x, q.shape[2], self.seq) for x in (k, v))
      q, k, v = (tokens_to_heads(x, self.seq) for x in (q, k, v))
      if segment_ids is not None:
        segment_ids = _gathered(segment_ids, self.seq)
      return heads_to_tokens(function(q, k, v, segment_ids), self.seq)

    return self._on_heads(local, q, k, v, segment_ids)

  def _on_heads(self, local, q, k, v, segment_ids):
    count = q.shape[2]
    if self.heads(k.shape[2]) is None:
      k, v = (repeat_heads(x, count) for x in (k, v))
    tokens = P(self.rows, self.seq)
    heads = P(*tokens, self.heads(count))
    return jax.shard_map(
      local, in_specs=(heads, heads, heads, tokens), out_specs=heads, check_vma=False
    )(q, k, v, segment_ids)


def divide(rows: int, length: int, cached: bool = False) -> Division | None:
  """How so many rows and tokens lie on the mesh in force; None without one.

  Raises:
    ValueError: the axis seq does not divide the tokens.
  """
  mesh = sharding.in_force()
  if mesh is None:
    return None
  parts = mesh.shape['seq']
  split = parts > 1 and not cached
  if split and length % parts:
    raise ValueError(f'a sequence has {length} tokens, which mesh axis seq of size {parts} does '
                     'not divide')  # fmt: skip
  return Division(sharding.rows_of(mesh, rows), 'seq' if split else None, mesh.shape['tensor'])


def _halo(h, width, segment_ids, axis_name):
  """The width - 1 inputs before this shard; zeros at the start of the sequence or of a document."""
  length = h.shape[1]
  if length < width - 1:
    raise ValueError(
      f'a shard of the sequence has {length} tokens; expected at least {width - 1} (conv_width - 1)'
    )
  parts = jax.lax.axis_size(axis_name)
  forward = [(i, i + 1) for i in range(parts - 1)]
  documents = None if segment_ids is None else count_segments(segment_ids)
  tail = next_tail(h, width, documents)
  tail = jax.lax.ppermute(tail, axis_name, forward)
  if segment_ids is None:
    return tail
  last_B = jax.lax.ppermute(segment_ids[:, -1], axis_name, forward)
  return jnp.where((last_B == segment_ids[:, 0])[:, None, None], tail, 0)


def _gathered(x, axis_name):
  return jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
