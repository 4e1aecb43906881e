"""Next-token losses, token by token, without ever holding all the logits."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rla_jax import sharding
from rla_jax.shapes import Array, Float, Int


class TokenScores(NamedTuple):
  """What the model says about given target tokens.

  Attributes:
    nll: -ln p(target) [B, T], in nats, float32.
    correct: whether the target is a most probable token [B, T].
  """

  nll: Float[Array, 'B T']
  correct: Array


def score(logits: Float[Array, 'B T S'], targets: Int[Array, 'B T']) -> TokenScores:
  """Scores of targets under logits.

  Args:
    logits: unnormalised log probabilities.
    targets: token ids, each in [0, S).
  """
  # A narrow dtype has no room for the vocabulary's size, with which indices are compared.
  return TokenScores(*_score(logits, targets.astype(jnp.int32)))


@jax.custom_vjp
def _score(logits_BTS, targets_BT):
  return _score_forward(logits_BTS, targets_BT)[0]


def _score_forward(logits_BTS, targets_BT):
  chosen_BT = jnp.take_along_axis(logits_BTS, targets_BT[..., None], axis=-1)[..., 0]
  maximum_BT, sum_BT = jax.lax.platform_dependent(
    logits_BTS, cuda=_maximum_and_sum_at_once, default=_maximum_and_sum
  )
  log_sum_BT = maximum_BT + jnp.log(sum_BT)
  scores = log_sum_BT - chosen_BT, chosen_BT >= maximum_BT
  return scores, (logits_BTS, log_sum_BT, targets_BT)


def _score_backward(kept, cotangents):
  """d nll / d logits = softmax(logits) - onehot(target)."""
  logits_BTS, log_sum_BT, targets_BT = kept
  softmax_BTS = jnp.exp(logits_BTS - log_sum_BT[..., None])
  subtract = functools.partial(
    jax.lax.platform_dependent, cuda=_subtract_by_comparing, default=_subtract_by_scatter
  )
  return subtract(cotangents[0][..., None] * softmax_BTS, targets_BT, cotangents[0]), None


_score.defvjp(_score_forward, _score_backward)


def _subtract_by_comparing(x_BTS, targets_BT, amount_BT):
  """x less the amount at the targets: elementwise, so that a GPU does it while it makes x."""
  index_BTS = jax.lax.broadcasted_iota(targets_BT.dtype, x_BTS.shape, x_BTS.ndim - 1)
  return x_BTS - jnp.where(index_BTS == targets_BT[..., None], amount_BT[..., None], 0)


def _subtract_by_scatter(x_BTS, targets_BT, amount_BT):
  """Likewise, in place: elementwise, XLA's compiler for CPUs holds another array of x's size."""

  def subtract(x_S, target, amount):
    return x_S.at[target].add(-amount)

  return jnp.vectorize(subtract, signature='(s),(),()->(s)')(x_BTS, targets_BT, amount_BT)


def _maximum_and_sum(logits_BTS):
  """m = max(logits) and sum(exp(logits - m)) over the vocabulary."""
  maximum_BT = jnp.max(logits_BTS, axis=-1)
  return maximum_BT, jnp.exp(logits_BTS - maximum_BT[..., None]).sum(axis=-1)


def _maximum_and_sum_at_once(logits_BTS):
  """Likewise, reading the logits once: sums of parts are rescaled to the larger maximum."""

  def merge(a, b):
    (a_max, a_sum), (b_max, b_sum) = a, b
    maximum = jnp.maximum(a_max, b_max)
    total = a_sum * jnp.exp(a_max - maximum) + b_sum * jnp.exp(b_max - maximum)
    return maximum, total

  lowest = jnp.finfo(logits_BTS.dtype).min  # not -inf, as inf - inf is NaN
  zero, one = (jnp.asarray(x, logits_BTS.dtype) for x in (0, 1))
  ones_BTS = jnp.broadcast_to(one, logits_BTS.shape)
  start = jnp.asarray(lowest, logits_BTS.dtype), zero
  return jax.lax.reduce((logits_BTS, ones_BTS), start, merge, (logits_BTS.ndim - 1,))


def score_chunked(
  head: Callable,
  kernel: Float[Array, 'D S'],
  x: Float[Array, 'B T D'],
  targets: Int[Array, 'B T'],
  chunk: int,
) -> TokenScores:
  """`score(head(x, kernel), targets)`, `chunk` positions of T at a time.

  The backward pass repeats the logits. On a mesh every device has a copy of the kernel for its own
  tokens: so it is gathered once for all chunks, and its gradient is summed over devices once.

  Args:
    head: x [B, t, D], kernel [D, S] -> logits [B, t, S].
    kernel: weights of the head.
    x: hidden states.
    targets: token ids.
    chunk: positions of T at a time, those of all devices together.
  """
  (B, T), mesh = targets.shape, sharding.in_force()
  rows = () if mesh is None else sharding.rows_of(mesh, B) or ()
  parts = 1 if mesh is None or T % mesh.shape['seq'] else mesh.shape['seq']
  axes = (*rows, 'seq') if parts > 1 else rows
  groups = math.prod(mesh.shape[axis] for axis in rows)

  def one(kernel, x, targets):
    return _score_chunked(lambda x: head(x, kernel), x, targets, max(1, chunk // parts))

  if chunk >= T or groups * parts == 1:
    return one(kernel, x, targets)

  def divided(a):
    """[B, T, ...] as [devices, B / groups, T / parts, ...]."""
    a = a.reshape(groups, B // groups, parts, T // parts, *a.shape[2:]).swapaxes(1, 2)
    a = a.reshape(groups * parts, B // groups, T // parts, *a.shape[4:])
    return jax.lax.with_sharding_constraint(a, PartitionSpec(axes))

  def joined(a):
    a = a.reshape(groups, parts, B // groups, T // parts).swapaxes(1, 2)
    return sharding.constrain(a.reshape(B, T), 'seq' if parts > 1 else None)

  copies = jnp.broadcast_to(kernel, (groups * parts, *kernel.shape))
  copies = jax.lax.with_sharding_constraint(copies, PartitionSpec(axes, None, 'tensor'))
  return jax.tree.map(joined, jax.vmap(one)(copies, divided(x), divided(targets)))


def _score_chunked(head, x, targets, chunk):
  B, T = targets.shape
  if chunk >= T:
    return score(head(x), targets)
  pieces = -(-T // chunk)
  pad = pieces * chunk - T

  def cut(a):
    a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(B, pieces, chunk, *a.shape[2:]), 1, 0)

  @jax.checkpoint
  def body(_, piece):
    return None, score(head(piece[0]), piece[1])

  _, scores = jax.lax.scan(body, None, (cut(x), cut(targets)))
  return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1).reshape(B, -1)[:, :T], scores)
