"""The gated short convolution that synthetic recall puts before a recurrent layer, and no layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rla_jax.layers.cache import check_call, last_segment
from rla_jax.layers.conv import init_taps, next_tail, short_convolution
from rla_jax.layers.settings import DEFAULT_INIT, check_positive_int
from rla_jax.ops.segments import count_segments
from rla_jax.shapes import Array, Float, Int, Segments


class ConvolutionCache(NamedTuple):
  """What a convolution remembers; the contract of `rla_jax.layers.cache`.

  Attributes:
    tail: its last W - 1 inputs [B, W-1, D].
    segment: id of the last token's document [B].
  """

  tail: Float[Array, 'B _ D']
  segment: Int[Array, ' B']


class BaseConv(nn.Module):
  """Gated convolution, y = x + (conv(x) + c) * (x W + b), c and b biases.

  It gives a recurrent layer behind it the tokens before the current one. As published the
  convolution is short; an implicit long one is part of other settings.

  Attributes:
    model_dim: width D, which `init_cache` needs; None: no cache.
    conv_width: tokens under the convolution.
    dtype: of the products; None: that of x.
    param_dtype: of the parameters.
    kernel_init: of W.

  Reference:
    Arora et al.: Zoology, arXiv:2312.04927.
  """

  model_dim: int | None = None
  conv_width: int = 3
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable = DEFAULT_INIT

  def __post_init__(self):
    check_positive_int('conv_width', self.conv_width)
    check_positive_int('model_dim', self.model_dim, optional=True)
    super().__post_init__()

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    segment_ids: Segments | None = None,
    cache: ConvolutionCache | None = None,
  ) -> Float[Array, 'B T D'] | tuple[Float[Array, 'B T D'], ConvolutionCache]:
    """Mixes neighbouring tokens; arguments and results as for `RecurrentLayer`."""
    check_call(x, segment_ids, cache, self.init_cache)
    dtype, D = jnp.dtype(self.dtype or x.dtype), x.shape[-1]
    weights = {
      'gate_proj': (self.kernel_init, (D, D)),
      'gate_bias': (nn.initializers.zeros, (D,)),
      'x_conv': (init_taps, (self.conv_width, D)),
      'x_bias': (self._init_bias, (D,)),
    }
    params = {
      name: self.param(name, init, shape, self.param_dtype)
      for name, (init, shape) in weights.items()
    }
    x_BTD = x.astype(dtype)
    if x.shape[1] == 0:
      return x_BTD if cache is None else (x_BTD, cache)
    documents_BT = None if segment_ids is None else count_segments(segment_ids)
    tail = None
    if cache is not None:
      tail = cache.tail
      if segment_ids is not None:
        other_B = segment_ids[:, 0] != cache.segment
        tail = jnp.where(other_B[:, None, None], jnp.zeros_like(tail), tail)
      last_BWD = next_tail(x_BTD, self.conv_width, documents_BT, tail).astype(cache.tail.dtype)
      cache = ConvolutionCache(last_BWD, last_segment(segment_ids, cache))
    mixed_BTD = short_convolution(x_BTD, params['x_conv'], documents_BT, tail)
    mixed_BTD = (mixed_BTD + params['x_bias'][None, None]).astype(dtype)
    gate_BTD = jnp.dot(x_BTD, params['gate_proj'].astype(dtype))
    gate_BTD += params['gate_bias'].astype(dtype)[None, None]
    y_BTD = x_BTD + mixed_BTD * gate_BTD
    return y_BTD if cache is None else (y_BTD, cache)

  @nn.nowrap
  def _init_bias(self, key, shape, dtype):
    """Uniform within the bound of the taps."""
    bound = self.conv_width**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  @nn.nowrap
  def init_cache(
    self, batch_size: int, max_length: int | None = None, dtype: jnp.dtype | None = None
  ) -> ConvolutionCache:
    """The cache before the first token.

    Args:
      batch_size: sequences.
      max_length: ignored: the size of the state does not depend on it.
      dtype: of the tail; None: the layer's `dtype`, or float32 if it has none.

    Raises:
      ValueError: the layer does not know its width.
    """
    del max_length
    if self.model_dim is None:
      raise ValueError('model_dim is None; expected the width of the inputs that a cache holds')
    shape = batch_size, self.conv_width - 1, self.model_dim
    tail = jnp.zeros(shape, dtype or self.dtype or jnp.float32)
    return ConvolutionCache(tail, jnp.zeros(batch_size, jnp.int32))


class Identity(nn.Module):
  """y = x: behind a norm, a block adds its normalised input.

  Attributes:
    dtype: of y; None: that of x.
    param_dtype: ignored.
    kernel_init: ignored.
  """

  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable = DEFAULT_INIT

  def __call__(self, x: Float[Array, 'B T D'], segment_ids: Segments | None = None, cache=None):
    """Arguments and results as for `RecurrentLayer`."""
    del segment_ids
    y = x.astype(self.dtype or x.dtype)
    return y if cache is None else (y, cache)

  @nn.nowrap
  def init_cache(self, batch_size: int, max_length: int | None = None, dtype=None) -> tuple:
    """Nothing to remember."""
    del batch_size, max_length, dtype
    return ()
