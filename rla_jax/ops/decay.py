"""Products of decays between two tokens of a chunk, from the logs of the single decays.

A log decay may be -inf, and a cumulative sum of large terms loses the digits of the small ones. So
differences of one cumulative sum are not used as they are: a decay that underflows counts as a
reset, and each log is split into a coarse part, whose sums are exact, and a small rest.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rla_jax.shapes import Array, Float

# Coarse parts are multiples of 1/8: sums are exact in float32 up to 2^21.
_STEPS = 8


def pair_decay(log_decay_C: Float[Array, '*batch C']) -> Float[Array, '*batch C C']:
  """exp(sum of log_decay over j < l <= i) at [i, j] for i >= j (1 on the diagonal), else 0."""
  sums = [x[..., :, None] - x[..., None, :] for x in _split_sums(log_decay_C)]
  lower = np.tri(log_decay_C.shape[-1], dtype=bool)
  return jnp.exp(jnp.where(lower, sum(sums), -jnp.inf))


def enter_decay(log_decay_C: Float[Array, '*batch C']) -> Float[Array, '*batch C']:
  """exp(sum of log_decay over l <= i): what is left at token i of the state before the chunk."""
  return jnp.exp(jnp.cumsum(_bounded(log_decay_C), axis=-1))


def leave_decay(log_decay_C: Float[Array, '*batch C']) -> Float[Array, '*batch C']:
  """exp(sum of log_decay over l > j): what is left of token j behind the chunk."""
  shifted = jnp.concatenate([log_decay_C[..., 1:], jnp.zeros_like(log_decay_C[..., :1])], axis=-1)
  return jnp.exp(jax.lax.cumsum(_bounded(shifted), axis=shifted.ndim - 1, reverse=True))


def shift(x_C: Array, first: float, axis: int) -> Array:
  """x moved one token later along `axis`, with `first` in front: from inclusive to exclusive."""
  front = jax.lax.slice_in_dim(x_C, 0, 1, axis=axis)
  rest = jax.lax.slice_in_dim(x_C, 0, x_C.shape[axis] - 1, axis=axis)
  return jnp.concatenate([jnp.full_like(front, first), rest], axis=axis)


def _floor(dtype) -> float:
  """Below it exp underflows."""
  return float(np.log(jnp.finfo(dtype).tiny))


def _bounded(log_decay: Array) -> Array:
  """-inf replaced by a log whose exp is 0 as well; no gradient flows through it."""
  floor = _floor(log_decay.dtype)
  return jnp.where(log_decay < floor, 2 * floor, log_decay)


def _split_sums(log_decay_C: Array) -> tuple[Array, Array]:
  """Cumulative sums of the coarse and fine parts; a reset's coarse part makes any sum underflow."""
  floor = _floor(log_decay_C.dtype)
  reset = log_decay_C < floor
  coarse = jnp.where(reset, math.floor(2 * floor), jnp.round(log_decay_C * _STEPS) / _STEPS)
  coarse = jax.lax.stop_gradient(coarse)
  fine = jnp.where(reset, 0, log_decay_C - coarse)
  return jnp.cumsum(coarse, axis=-1), jnp.cumsum(fine, axis=-1)
