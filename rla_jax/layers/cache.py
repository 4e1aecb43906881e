"""What a layer remembers between two calls on the same sequences: plain pytrees of arrays.

The contract, the same for every layer and for the language model:

    y        = layer(x, segment_ids)               # the whole sequence
    y, cache = layer(x, segment_ids, cache)        # the next T >= 0 tokens of it

where the first `cache` is `layer.init_cache(batch_size, ...)`. However a sequence is cut into
calls, the outputs are the same. `segment_ids` continue those of the call before: where the first id
differs from the last one seen, a new document starts and nothing of the old one is used. Without
ids the call continues the document it is in.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rla_jax.ops import ResidualState
from rla_jax.ops.segments import count_segments
from rla_jax.ops.validate import check_array, check_segment_ids
from rla_jax.shapes import Array, Float, Int, Segments


class RecurrentCache(NamedTuple):
  """Cache of a recurrent layer; its size does not depend on the length of the sequence.

  Attributes:
    tails: last W - 1 inputs of the convolutions of q, k and v, [B, W-1, channels] each; empty
      without convolutions.
    state: recurrent state in float32.
    segment: id of the last token's document [B].
    length: tokens seen [], for rotary positions.
  """

  tails: dict[str, Float[Array, 'B _ X']]
  state: ResidualState
  segment: Int[Array, ' B']
  length: Int[Array, '']

  def resume(self, segment_ids: Segments | None) -> 'RecurrentCache':
    """The cache before a call: emptied for sequences whose first token starts a new document."""
    if segment_ids is None:
      return self
    new_B = segment_ids[:, 0] != self.segment

    def empty(x):
      return jnp.where(jnp.expand_dims(new_B, range(1, x.ndim)), jnp.zeros_like(x), x)

    tails, state = jax.tree.map(empty, (self.tails, self.state))
    return self._replace(tails=tails, state=state)


class AttentionCache(NamedTuple):
  """Cache of an attention layer: the keys and values of S past tokens.

  Attributes:
    key: rotated keys [B, S, G, K].
    value: values [B, S, G, K].
    documents: index of each kept token's document [B, S], -1 where there is none yet.
    document: index of the last token's document [B].
    segment: id of the last token's document [B].
    length: tokens seen [].
  """

  key: Float[Array, 'B S G K']
  value: Float[Array, 'B S G K']
  documents: Int[Array, 'B S']
  document: Int[Array, ' B']
  segment: Int[Array, ' B']
  length: Int[Array, '']

  def count(self, segment_ids: Segments | None, length: int) -> Segments:
    """Document index [B, T] of the next tokens."""
    if segment_ids is None:
      return jnp.repeat(self.document[:, None], length, axis=1)
    new_B = segment_ids[:, 0] != self.segment
    return (self.document + new_B)[:, None] + count_segments(segment_ids)


def last_segment(segment_ids: Segments | None, cache) -> Int[Array, ' B']:
  """Id of the document that a call leaves open."""
  return cache.segment if segment_ids is None else segment_ids[:, -1].astype(jnp.int32)


def check_call(x, segment_ids, cache, init_cache: Callable[[int], tuple]) -> None:
  """Checks a layer's arguments by shapes, dtypes (not the cache's) and no values: free under jit.

  Args:
    x: expected floating [B, T, D].
    segment_ids: expected integers [B, T], or None.
    cache: expected as `init_cache` makes it, or None.
    init_cache: the cache of so many sequences.

  Raises:
    ValueError: one of the three is something else; names it.
  """
  check_array('x', x, 'B, T, D')
  batch_size, length, _ = x.shape
  if segment_ids is not None:
    check_segment_ids(segment_ids, (batch_size, length))
  if cache is None:
    return
  fresh = jax.eval_shape(lambda: init_cache(batch_size))
  if not isinstance(cache, type(fresh)):
    raise ValueError(f'cache has type {type(cache).__name__}; expected {type(fresh).__name__}')
  given, expected = _leaf_shapes(cache), _leaf_shapes(fresh)
  for leaf in expected | given:
    was, wanted = (shapes.get(leaf, 'no array') for shapes in (given, expected))
    if was != wanted:
      raise ValueError(
        f'cache{leaf} has {was}; expected {wanted}, as of init_cache({batch_size}) of this layer'
      )


def _leaf_shapes(tree) -> dict[str, str]:
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path): f'shape {jnp.shape(leaf)}' for path, leaf in leaves}
