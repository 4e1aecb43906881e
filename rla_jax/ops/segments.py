"""Packed documents: what ids mean, and how a broken document is kept from its neighbours.

Chunked forms multiply masked matrices with the rows of a whole chunk, and 0 * NaN is NaN. So a
document that holds a NaN or an infinity would ruin those that share a chunk with it. `isolate`
replaces the bad tokens by zeros before the operator and gives the document its NaN back behind it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from rla_jax.ops.inputs import Inputs
from rla_jax.ops.state import ResidualState
from rla_jax.shapes import Array, Segments, Values


def count_segments(segment_ids_BT: Segments) -> Segments:
  """Index of each token's document: 0 at the first token, one more wherever the id changes."""
  changes_BT = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1]) != 0
  return jnp.cumsum(changes_BT, axis=1, dtype=jnp.int32)


def isolate(
  run: Callable[[Inputs], tuple[Values, ResidualState]], inputs: Inputs, finite: bool = False
) -> tuple[Values, ResidualState]:
  """Runs the operator so that what is not finite stays inside its own document.

  There it spreads as it would alone: the outputs from the first bad token on, the final state if it
  is the last document, and all gradients of the document's tokens are NaN.

  Args:
    run: the operator.
    inputs: what it takes.
    finite: q, k and v are known to be finite. Then no pass over them is made, forward or backward:
      gradients are NaN for the gates of a broken document and its states, not for its q, k and v.
  """
  searched = ('beta', 'gamma') if finite else ('q', 'k', 'v', 'beta', 'gamma')
  bad_BT = _not_finite(inputs, searched)
  poisoned_BT, broken_BT = _spread(bad_BT, inputs.segments)

  def shield_tokens(x):
    return None if x is None else _shield(x, bad_BT, broken_BT)

  tokens = {name: shield_tokens(getattr(inputs, name)) for name in ('log_decay', *searched)}
  state = jax.tree.map(lambda s: _shield(s, bad_BT[:, 0], broken_BT[:, 0]), inputs.state)
  o_BTHV, state = run(inputs._replace(**tokens, state=state))
  o_BTHV = _poison(o_BTHV, poisoned_BT, broken_BT)
  lost_B = broken_BT[:, -1]
  return o_BTHV, jax.tree.map(lambda s: _poison(s, lost_B, lost_B), state)


def _not_finite(inputs: Inputs, searched: Sequence[str]) -> Array:
  """True [B, T] where any array of a token is not finite; the initial state counts as token 0."""

  def any_per_token(bad):
    return bad.any(axis=tuple(range(2, bad.ndim)))

  # A log decay of -inf is a reset, not a fault.
  bad_BT = any_per_token(jnp.isnan(inputs.log_decay) | (inputs.log_decay == jnp.inf))
  for x in (getattr(inputs, name) for name in searched):
    if x is not None:
      bad_BT |= any_per_token(~jnp.isfinite(x))
  for s in jax.tree.leaves(inputs.state):
    # 0 s is NaN where s is not finite. If s is constant zeros, XLA knows this sum at once; whether
    # any element is not finite it would work out one by one, for minutes.
    bad_B = jnp.isnan((0 * s).sum(axis=(1, 2, 3)))
    bad_BT = bad_BT.at[:, 0].set(bad_BT[:, 0] | bad_B)
  return bad_BT


def _spread(bad_BT: Array, segments_BT: Segments) -> tuple[Array, Array]:
  """Tokens at or behind a bad one of their document, and all tokens of such documents."""
  length = bad_BT.shape[1]
  index_BT = jax.lax.broadcasted_iota(jnp.int32, bad_BT.shape, 1)
  starts_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1]) != 0
  ends_BT = jnp.diff(segments_BT, axis=1, append=segments_BT[:, -1:] + 1) != 0
  start_BT = jax.lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)
  end_BT = jax.lax.cummin(jnp.where(ends_BT, index_BT, length), axis=1, reverse=True)
  before_BT = jax.lax.cummax(jnp.where(bad_BT, index_BT, -1), axis=1)
  after_BT = jax.lax.cummin(jnp.where(bad_BT, index_BT, length), axis=1, reverse=True)
  poisoned_BT = before_BT >= start_BT
  return poisoned_BT, poisoned_BT | (after_BT <= end_BT)


@jax.custom_vjp
def _shield(x: Array, bad: Array, broken: Array) -> Array:
  """x with zeros where `bad`; its gradient is NaN where `broken`. Both masks are leading axes."""
  del broken
  return jnp.where(_expand(bad, x), 0, x)


def _shield_forward(x, bad, broken):
  return _shield(x, bad, broken), broken


def _shield_backward(broken, dx):
  return jnp.where(_expand(broken, dx), jnp.nan, dx), None, None


_shield.defvjp(_shield_forward, _shield_backward)


@jax.custom_vjp
def _poison(x: Array, bad: Array, broken: Array) -> Array:
  """x with NaN where `bad`; no gradient, which may be NaN itself, comes in where `broken`."""
  del broken
  return jnp.where(_expand(bad, x), jnp.nan, x)


def _poison_forward(x, bad, broken):
  return _poison(x, bad, broken), broken


def _poison_backward(broken, dx):
  return jnp.where(_expand(broken, dx), 0, dx), None, None


_poison.defvjp(_poison_forward, _poison_backward)


def _expand(mask: Array, like: Array) -> Array:
  return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))
