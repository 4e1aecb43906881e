"""Short causal convolution of every channel on its own, within documents and across calls."""

import jax
import jax.numpy as jnp

from rla_jax.layers.norms import at_least_float32
from rla_jax.shapes import Array, Float, Segments


def short_convolution(
  x: Float[Array, 'B T X'],
  kernel: Float[Array, 'W X'],
  documents: Segments | None = None,
  tail: Float[Array, 'B W-1 X'] | None = None,
) -> Float[Array, 'B T X']:
  """y_t = sum_j kernel_{W-1-j} x_{t-j}, j = 0 .. W-1, over tokens of t's own document only.

  Args:
    x: inputs.
    kernel: taps; the last one belongs to the current token.
    documents: index of each token's document, counted from 0 along T. None: one document.
    tail: the W - 1 inputs before the first token; they belong to document 0. None: zeros.

  Returns:
    y in float32 or better. What is not finite in one document does not reach another.
  """
  width, length = kernel.shape[0], x.shape[1]
  dtype = at_least_float32(x.dtype)
  padded_BTX = _behind(tail, x, width)
  if documents is not None:
    padded_BT = jnp.pad(documents, ((0, 0), (width - 1, 0)))
  y_BTX = jnp.zeros(x.shape, dtype)
  for tap in range(width):
    shifted_BTX = padded_BTX[:, tap : tap + length]
    if documents is not None:
      same_BT = padded_BT[:, tap : tap + length] == documents
      shifted_BTX = jnp.where(same_BT[..., None], shifted_BTX, 0)
    y_BTX += shifted_BTX.astype(dtype) * kernel[tap].astype(dtype)[None, None]
  return y_BTX


def next_tail(
  x: Float[Array, 'B T X'],
  width: int,
  documents: Segments | None = None,
  tail: Float[Array, 'B W-1 X'] | None = None,
) -> Float[Array, 'B W-1 X']:
  """The last W - 1 inputs, zeros where they are not of the last token's document.

  Arguments as for `short_convolution`; feed the result to the next call as its `tail`.
  """
  length = x.shape[1]
  last_BTX = _behind(tail, x, width)[:, length:]
  if documents is not None:
    documents_BT = jnp.pad(documents, ((0, 0), (width - 1, 0)))[:, length:]
    last_BTX = jnp.where((documents_BT == documents[:, -1:])[..., None], last_BTX, 0)
  return last_BTX


def _behind(tail, x, width):
  if tail is None:
    return jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
  return jnp.concatenate([tail.astype(x.dtype), x], axis=1)


def init_taps(key, shape, dtype=jnp.float32):
  """Taps [W, X], uniform within 1 / sqrt(W), the usual scale of a depthwise convolution."""
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)
