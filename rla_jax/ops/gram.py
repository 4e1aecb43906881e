"""Products of queries and keys of a chunk with the decays between their tokens.

With L the decay from token j to i and Lx the same without token i's own decay (the prediction reads
the state before it):

    erase = strict(L * K K^T)     predict = strict(Lx * K K^T)
    before = strict(L * Q K^T)    upto = lower(L * Q K^T)

A decay a channel moves into the products. It is never divided by: a pair within a block of tokens
gets the decay of its own channels, a pair of two blocks one factor up to the border before i's
block and one from there on, both at most 1.
"""

from typing import NamedTuple

import jax.numpy as jnp

from rla_jax.ops.decay import enter_decay, leave_decay, pair_decay, shift
from rla_jax.shapes import Array

# Tokens of a block in which channel decays are formed pair by pair.
CHANNEL_BLOCK = 16


class Boundaries(NamedTuple):
  """Document boundaries of a chunk, as masks.

  Attributes:
    same_CC: tokens i and j are of one document.
    entering_C: the token is of the document that the state before the chunk belongs to.
    leaving_C: the token is of the document that the state behind the chunk belongs to.
    through: the two states belong to one document.
  """

  same_CC: Array
  entering_C: Array
  leaving_C: Array
  through: Array


def boundaries(segments_BC: Array, previous_B: Array) -> Boundaries:
  """Masks with a head axis of one, given the document before the chunk."""
  last_B = segments_BC[:, -1]
  return Boundaries(
    (segments_BC[:, :, None] == segments_BC[:, None, :])[:, None],
    (segments_BC == previous_B[:, None])[:, None],
    (segments_BC == last_B[:, None])[:, None],
    (last_B == previous_B)[:, None],
  )


class Gram(NamedTuple):
  """What a chunk needs of its queries, keys and decays; leading axes [B, H] throughout.

  Attributes:
    erase, predict, before, upto: [C, C], as above.
    before_plain: strict(Lx * Q K^T), for the summed read-out.
    key, query: rows [C, K] that read an incoming state; `*_in` [C, 1 or K] decays them to each
      token, `*_plain` to the token before.
    key_out: rows [C, K] that write, decayed to the end of the chunk.
    carry: decay of a state across the chunk, [1 or K, 1].
  """

  erase: Array
  predict: Array
  before: Array
  before_plain: Array
  upto: Array
  key: Array
  query: Array
  decay_in: Array
  decay_plain: Array
  key_out: Array
  carry: Array

  @property
  def shared_decay(self) -> bool:
    """One decay for all channels: it scales a read's result instead of its rows."""
    return self.decay_in.shape[-1] == 1

  def read(self, rows_CK: Array, decay: Array, state_KV: Array, precision) -> Array:
    """Reads a state that comes into the chunk."""
    if self.shared_decay:
      return decay * jnp.matmul(rows_CK, state_KV, precision=precision)
    return jnp.matmul(decay * rows_CK, state_KV, precision=precision)


def gram(q_CK: Array, k_CK: Array, log_decay: Array, bounds: Boundaries | None) -> Gram:
  """Gram of a chunk: q, k [B, H, C, K], log_decay [B, H, C] or [B, H, C, K]."""
  if log_decay.ndim == q_CK.ndim:
    erase, predict, before, before_plain, upto = _channel_products(q_CK, k_CK, log_decay)
    log_decay = jnp.swapaxes(log_decay, -1, -2)
  else:
    erase, predict, before, before_plain, upto = _shared_products(q_CK, k_CK, log_decay)
    log_decay = log_decay[..., None, :]
  decay_in, decay_out = enter_decay(log_decay), leave_decay(log_decay)
  decay_plain = shift(decay_in, 1, axis=-1)
  carry = decay_in[..., -1:]
  if bounds is not None:
    same, entering = bounds.same_CC, bounds.entering_C[..., None, :]
    erase, predict, before, before_plain, upto = (
      jnp.where(same, x, 0) for x in (erase, predict, before, before_plain, upto)
    )
    decay_in, decay_plain = (jnp.where(entering, x, 0) for x in (decay_in, decay_plain))
    decay_out = jnp.where(bounds.leaving_C[..., None, :], decay_out, 0)
    carry = jnp.where(bounds.through[..., None, None], carry, 0)
  decay_in, decay_plain, decay_out = (
    jnp.swapaxes(x, -1, -2) for x in (decay_in, decay_plain, decay_out)
  )
  return Gram(
    erase, predict, before, before_plain, upto, k_CK, q_CK, decay_in, decay_plain,
    decay_out * k_CK, carry,
  )  # fmt: skip


def _shared_products(q_CK, k_CK, log_decay_C):
  decay_CC = pair_decay(log_decay_C)
  strict_CC = jnp.tril(decay_CC, -1)
  plain_CC = shift(decay_CC, 0, axis=-2)
  keys_CC, queries_CC = _dot_transposed(k_CK, k_CK), _dot_transposed(q_CK, k_CK)
  return (
    strict_CC * keys_CC,
    plain_CC * keys_CC,
    strict_CC * queries_CC,
    plain_CC * queries_CC,
    decay_CC * queries_CC,
  )


def _channel_products(q_CK, k_CK, log_decay_CK):
  """The five products, block row by block row."""
  size, channels = k_CK.shape[-2:]
  block = min(size, CHANNEL_BLOCK)
  if size % block:
    raise ValueError(f'chunk of {size} tokens; expected a multiple of {block} with channel decays')
  count = size // block

  def split(x):
    return x.reshape(*x.shape[:-2], count, block, channels)

  q, k, log_decay = split(q_CK), split(k_CK), split(log_decay_CK)
  by_channel = jnp.swapaxes(log_decay, -1, -2)
  enter = jnp.swapaxes(enter_decay(by_channel), -1, -2)
  plain = shift(enter, 1, axis=-2)
  leave = jnp.swapaxes(leave_decay(by_channel), -1, -2)
  whole = log_decay.sum(axis=-2)
  # [.., i, j, K]: channels last, so that the sum over them runs along memory.
  near = pair_decay(by_channel)
  near, near_strict, near_plain = (
    jnp.moveaxis(x, -3, -1) for x in (near, jnp.tril(near, -1), shift(near, 0, axis=-2))
  )
  rows = ((k, enter, near_strict), (k, plain, near_plain), (q, enter, near_strict),
          (q, plain, near_plain), (q, enter, near))  # fmt: skip
  return tuple(_assemble(x, decay, pairs, k, leave, whole) for x, decay, pairs in rows)


def _assemble(x, decay, pairs, k, leave, whole):
  """One [C, C] product from its blocks: `pairs` on the diagonal, factored decays below it."""
  count, block = k.shape[-3:-1]
  lead = k.shape[:-3]
  rows = []
  for i in range(count):
    on_diagonal = (x[..., i, :, None, :] * k[..., i, None, :, :] * pairs[..., i, :, :, :]).sum(-1)
    parts = [on_diagonal]
    if i:
      # From the end of block j to the start of block i.
      between = jnp.swapaxes(leave_decay(jnp.swapaxes(whole[..., :i, :], -1, -2)), -1, -2)
      columns = k[..., :i, :, :] * leave[..., :i, :, :] * between[..., None, :]
      columns = columns.reshape(*lead, i * block, k.shape[-1])
      parts.insert(0, _dot_transposed(x[..., i, :, :] * decay[..., i, :, :], columns))
    parts.append(jnp.zeros((*lead, block, (count - 1 - i) * block), x.dtype))
    rows.append(jnp.concatenate(parts, axis=-1))
  return jnp.concatenate(rows, axis=-2)


def _dot_transposed(x_CK: Array, y_CK: Array) -> Array:
  """x y^T in full precision: errors of the Gram matrix are amplified by the inverse."""
  return jnp.einsum('...ik,...jk->...ij', x_CK, y_CK, precision='highest')
