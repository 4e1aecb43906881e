"""Next-token losses, token by token, without ever holding all the logits."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rla_jax import sharding
from rla_jax.layers.norms import at_least_float32
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

  The backward pass repeats the logits; that of `summed_loss` has no need to.

  Args:
    head: x [B, t, D], kernel [D, S] -> logits [B, t, S].
    kernel: weights of the head.
    x: hidden states.
    targets: token ids.
    chunk: positions of T at a time, those of all devices together.
  """

  def one(chunk, kernel, x, targets):
    @jax.checkpoint
    def body(_, piece):
      return None, score(head(piece[0], kernel), piece[1])

    if chunk >= targets.shape[1]:
      return score(head(x, kernel), targets)
    _, scores = jax.lax.scan(body, None, _cut(chunk, x, targets))
    return jax.tree.map(lambda a: _uncut(a, targets.shape[1]), scores)

  places = _places(*targets.shape, chunk)
  if places is None:
    return one(chunk, kernel, x, targets)
  found = jax.vmap(functools.partial(one, places.chunk))(
    places.copied(kernel), places.divided(x), places.divided(targets)
  )
  return jax.tree.map(places.joined, found)


def summed_loss(
  head: Callable,
  kernel: Float[Array, 'D S'],
  x: Float[Array, 'B T D'],
  targets: Int[Array, 'B T'],
  weights: Float[Array, 'B T'],
  chunk: int | None = None,
) -> Float[Array, '']:
  """sum(weights * nll) of `score(head(x, kernel), targets)`, `chunk` positions of T at a time.

  Whatever becomes of a sum, its gradient is the same but for a factor. So it is worked out beside
  the value where it will be asked for, and the logits are made once.

  Args:
    head: x [B, t, D], kernel [D, S] -> logits [B, t, S].
    kernel: weights of the head.
    x: hidden states.
    targets: token ids.
    weights: of the targets; where one is 0, the target's nll may be anything, a NaN included.
    chunk: positions of T at a time, those of all devices together; None: all.
  """
  arrays = x, targets.astype(jnp.int32), weights.astype(at_least_float32(x.dtype))
  chunk = targets.shape[1] if chunk is None else chunk
  places = _places(*targets.shape, chunk)
  if places is None:
    return _summed(head, chunk, kernel, *arrays)
  summed = functools.partial(_summed, head, places.chunk)
  return jax.vmap(summed)(places.copied(kernel), *map(places.divided, arrays)).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(head, chunk, kernel_DS, x_BTD, targets_BT, weights_BT):
  def body(_, piece):
    x, targets, _ = piece
    return None, score(head(x, kernel_DS), targets).nll

  _, nll = jax.lax.scan(body, None, _cut(chunk, x_BTD, targets_BT, weights_BT))
  return _total(_uncut(nll, targets_BT.shape[1]), weights_BT)


def _summed_forward(head, chunk, kernel_DS, x_BTD, targets_BT, weights_BT):
  def body(dkernel, piece):
    x, targets, weights = piece
    nll, pull = jax.vjp(lambda kernel, x: score(head(x, kernel), targets).nll, kernel_DS, x)
    more, dx = pull(weights)
    return dkernel + more, (nll, dx)

  pieces = _cut(chunk, x_BTD, targets_BT, weights_BT)
  dkernel_DS, found = jax.lax.scan(body, jnp.zeros_like(kernel_DS), pieces)
  nll_BT, dx_BTD = (_uncut(a, targets_BT.shape[1]) for a in found)
  return _total(nll_BT, weights_BT), (dkernel_DS, dx_BTD, nll_BT, weights_BT)


def _summed_backward(head, chunk, kept, factor):
  del head, chunk
  dkernel_DS, dx_BTD, nll_BT, weights_BT = kept
  dweights_BT = jnp.where(weights_BT != 0, nll_BT, 0)
  found = ((factor * d).astype(d.dtype) for d in (dkernel_DS, dx_BTD, dweights_BT))
  dkernel_DS, dx_BTD, dweights_BT = found
  return dkernel_DS, dx_BTD, None, dweights_BT


_summed.defvjp(_summed_forward, _summed_backward)


def _total(nll_BT, weights_BT):
  return jnp.where(weights_BT != 0, weights_BT * nll_BT, 0).sum()


def _cut(chunk, *arrays):
  """[B, T, ...] as [pieces, B, chunk, ...], the last piece filled up with zeros."""

  def cut(a):
    size = max(1, min(chunk, a.shape[1]))
    pieces = -(-a.shape[1] // size)
    a = jnp.pad(a, ((0, 0), (0, pieces * size - a.shape[1])) + ((0, 0),) * (a.ndim - 2))
    return jnp.moveaxis(a.reshape(len(a), pieces, size, *a.shape[2:]), 1, 0)

  return tuple(map(cut, arrays))


def _uncut(a, length):
  a = jnp.moveaxis(a, 0, 1)
  return a.reshape(len(a), a.shape[1] * a.shape[2], *a.shape[3:])[:, :length]


@dataclasses.dataclass(frozen=True)
class _Places:
  """How [B, T, ...] is divided where every device has a copy of the head's kernel for its tokens.

  So the kernel is gathered once for all chunks, and its gradient is summed over devices once.

  Attributes:
    rows: mesh axes of B.
    groups: devices along them.
    parts: devices along T.
    chunk: positions of T at a time on each device.
  """

  rows: tuple[str, ...]
  groups: int
  parts: int
  chunk: int

  @property
  def axes(self) -> tuple[str, ...]:
    return (*self.rows, 'seq') if self.parts > 1 else self.rows

  def copied(self, kernel_DS):
    """[devices, D, S]."""
    copies = jnp.broadcast_to(kernel_DS, (self.groups * self.parts, *kernel_DS.shape))
    return jax.lax.with_sharding_constraint(copies, PartitionSpec(self.axes, None, 'tensor'))

  def divided(self, a):
    """[B, T, ...] as [devices, B / groups, T / parts, ...]."""
    B, T = a.shape[:2]
    a = a.reshape(self.groups, B // self.groups, self.parts, T // self.parts, *a.shape[2:])
    a = a.swapaxes(1, 2).reshape(-1, B // self.groups, T // self.parts, *a.shape[4:])
    return jax.lax.with_sharding_constraint(a, PartitionSpec(self.axes))

  def joined(self, a):
    """[devices, B / groups, T / parts] as [B, T]."""
    a = a.reshape(self.groups, self.parts, *a.shape[1:]).swapaxes(1, 2)
    a = a.reshape(self.groups * a.shape[1], -1)
    return sharding.constrain(a, 'seq' if self.parts > 1 else None)


def _places(B, T, chunk) -> _Places | None:
  """None: XLA divides the work by itself."""
  mesh = sharding.in_force()
  if mesh is None or chunk >= T:
    return None
  rows = sharding.rows_of(mesh, B) or ()
  groups = math.prod(mesh.shape[axis] for axis in rows)
  parts = 1 if T % mesh.shape['seq'] else mesh.shape['seq']
  return None if groups * parts == 1 else _Places(rows, groups, parts, max(1, chunk // parts))
