"""Rotary position embedding."""

import jax.numpy as jnp

from rla_jax.layers.norms import at_least_float32
from rla_jax.shapes import Array, Float, Int


def rotate(
  x: Float[Array, 'B T H K'], positions: Int[Array, ' T'], base: float = 10_000.0
) -> Float[Array, 'B T H K']:
  """Rotates the pairs (x_i, x_{i + K/2}) by the angle position * base^(-2i/K).

  Products of a rotated query and key depend on the distance of their positions alone.

  Args:
    x: queries or keys; K is even.
    positions: of the tokens.
    base: of the wave lengths, which run from 2 pi to 2 pi base.

  Returns:
    The rotated x, in float32 or better.

  Raises:
    ValueError: an odd K.

  Reference:
    Su et al.: RoFormer, arXiv:2104.09864.
  """
  size = x.shape[-1]
  if size % 2:
    raise ValueError(f'x has {size} channels a head (shape {x.shape}); expected an even number')
  dtype = at_least_float32(x.dtype)
  frequency_K = base ** (-jnp.arange(0, size, 2, dtype=dtype) / size)
  angle_TK = positions.astype(dtype)[:, None] * frequency_K[None]
  sin, cos = (f(angle_TK)[None, :, None] for f in (jnp.sin, jnp.cos))
  a, b = jnp.split(x.astype(dtype), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
