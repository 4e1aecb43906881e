"""Next-token losses, token by token, without ever holding all the logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

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
  chosen_BT = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  nll_BT = jax.nn.logsumexp(logits, axis=-1) - chosen_BT
  return TokenScores(nll_BT, chosen_BT >= jnp.max(logits, axis=-1))


def score_chunked(head, x: Float[Array, 'B T D'], targets: Int[Array, 'B T'], chunk: int):
  """`score(head(x), targets)`, `chunk` positions at a time; the backward pass repeats the logits.

  The chunks are cut from T, so that a batch that is sharded over devices stays where it is.

  Args:
    head: x [B, t, D] -> logits [B, t, S].
    x: hidden states.
    targets: token ids.
    chunk: positions of T at a time.

  Returns:
    TokenScores.
  """
  B, T = targets.shape
  mesh = sharding.in_force()
  parts = 1 if mesh is None else mesh.shape['seq']
  if parts > 1 and T % parts == 0 and chunk < T:
    # Shards of the sequence as rows: a chunk takes its share from each, so that all are at work.
    x, targets = (a.reshape(B * parts, T // parts, *a.shape[2:]) for a in (x, targets))
    scores = _score_chunked(head, x, targets, max(1, chunk // parts))
    return jax.tree.map(lambda a: a.reshape(B, T), scores)
  return _score_chunked(head, x, targets, chunk)


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
