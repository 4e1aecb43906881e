"""Normalisation: L2 for queries and keys, RMS or variance for activations.

Computed in float32 or better.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rla_jax.shapes import Array, Float


def at_least_float32(dtype) -> jnp.dtype:
  """float32 for the half types, else the dtype itself."""
  return jnp.promote_types(dtype, jnp.float32)


def l2_norm(x: Float[Array, '*B X'], scale: float = 1.0, eps: float = 1e-6) -> Float[Array, '*B X']:
  """scale x / sqrt(sum x^2 + eps) along the last axis, in float32 or better.

  Args:
    x: vectors.
    scale: length of the result; folded in here to round once.
    eps: keeps the gradient at x = 0 finite.

  Returns:
    The vectors in float32 (float64 for float64 input).
  """
  x = x.astype(at_least_float32(x.dtype))
  return x * (scale * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + eps))


def rms_norm(
  x: Float[Array, '*B X'], scale: Float[Array, ' X'], eps: float = 1e-6
) -> Float[Array, '*B X']:
  """scale x / sqrt(mean x^2 + eps) along the last axis, in float32 or better.

  Args:
    x: activations.
    scale: one factor a channel.
    eps: added to the mean square.

  Returns:
    The result in float32 (float64 for float64 input).

  Reference:
    Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv:1910.07467.
  """
  x = x.astype(at_least_float32(x.dtype))
  x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
  return x * jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


class RMSNorm(nn.Module):
  """RMS norm with a learned scale [D] that starts at one; see `rms_norm`.

  Attributes:
    eps: added to the mean square.
    dtype: dtype of the result; None: that of x.
    param_dtype: dtype of the scale.
  """

  eps: float = 1e-6
  dtype: jnp.dtype | None = None
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    scale_D = self.param('scale', nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    return rms_norm(x, scale_D, self.eps).astype(self.dtype or x.dtype)


class LayerNorm(nn.Module):
  """scale (x - mean x) / sqrt(var x + eps) + bias, both learned [D].

  Attributes:
    eps: added to the variance.
    param_dtype: dtype of scale and bias.

  Reference:
    Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450.
  """

  eps: float = 1e-6
  param_dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
    dtype, shape = at_least_float32(x.dtype), (1,) * (x.ndim - 1) + (-1,)
    scale_D = self.param('scale', nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    bias_D = self.param('bias', nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
    centred = x.astype(dtype) - jnp.mean(x.astype(dtype), axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.eps)
    y = unit * scale_D.astype(dtype).reshape(shape) + bias_D.astype(dtype).reshape(shape)
    return y.astype(x.dtype)
