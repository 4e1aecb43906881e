"""What the recurrence does with a batch, in a few numbers."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rla_jax.layers.settings import Settings
from rla_jax.shapes import Array, Float


def recurrence_statistics(
  s: Settings, recur: Callable, heads: dict, gates: tuple
) -> dict[str, Float[Array, '']]:
  """Means over tokens, heads and channels, as far as a layer has what they are about.

  Args:
    s: what the layer computes.
    recur: (settings, heads, gates) -> o [B, T, H, V] and the state after the last token.
    heads: q, k and v by name.
    gates: natural log of the decay, beta, gamma; None where there is none.

  Returns:
    alpha: of the decay. beta, gamma: of the write strengths. clipped: share of the residuals'
    channels that the clip cuts. base_norm, residual_norm: Frobenius norm of a head's S and R after
    the last token.
  """
  log_decay, beta, gamma = gates
  found = {}
  if log_decay is not None:
    found['alpha'] = jnp.mean(jnp.exp(log_decay))
  if beta is not None:
    found['beta'] = jnp.mean(beta)
  if gamma is not None:
    found['gamma'] = jnp.mean(gamma)
  _, state = recur(s, heads, gates)
  for name in ('base', 'residual'):
    x_BHKV = getattr(state, name)
    if x_BHKV is not None:
      found[f'{name}_norm'] = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(x_BHKV), axis=(2, 3))))
  if s.residual and s.clip is not None:
    found['clipped'] = _clipped(s, recur, heads, gates)
  return jax.tree.map(jax.lax.stop_gradient, found)


def _clipped(s, recur, heads, gates):
  """The 'sum' read-out of k with gamma = 0, so R = 0, is the prediction S_{t-1}^T k_t itself."""
  log_decay, beta, gamma = gates
  plain = dataclasses.replace(s, readout='sum')
  predicted, _ = recur(plain, {**heads, 'q': heads['k']}, (log_decay, beta, 0 * gamma))
  error = heads['v'].astype(jnp.float32) - predicted.astype(jnp.float32)
  return jnp.mean(jnp.abs(error) >= s.clip, dtype=jnp.float32)
