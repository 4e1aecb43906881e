"""The Linen layers of the paper: Residual Linear Attention and Residual Delta Net."""

import functools
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from rla_jax.layers import recurrent
from rla_jax.layers.cache import RecurrentCache, check_call
from rla_jax.layers.settings import Settings
from rla_jax.shapes import Array, Float, Segments


class RecurrentLayer(Settings, nn.Module, kw_only=True):
  """A layer whose attributes are those of `Settings`; the named layers are choices of them.

  `layer(x, segment_ids=None) -> y`, and with a cache `layer(x, segment_ids, cache) -> (y, cache)`:
  the contract of `rla_jax.layers.cache`.
  """

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    segment_ids: Segments | None = None,
    cache: RecurrentCache | None = None,
  ) -> Float[Array, 'B T D'] | tuple[Float[Array, 'B T D'], RecurrentCache]:
    """Mixes the tokens of every sequence.

    Args:
      x: inputs [B, T, D], T >= 0.
      segment_ids: int [B, T]; where the id changes, a new document starts. None: one document.
      cache: from `init_cache` or the call before; T = 1 runs the recurrent step.

    Returns:
      y [B, T, D] in `dtype`; with a cache, (y, the cache after the last token).

    Raises:
      ValueError: an input of another shape or dtype, a cache of another shape; a bad attribute.
    """
    check_call(x, segment_ids, cache, self.init_cache)
    settings = self.plain()
    params = {
      name: self.param(name, init, shape, self.param_dtype)
      for name, (shape, init) in recurrent.parameters(settings, x.shape[-1]).items()
    }
    observe = None
    if self.is_mutable_collection('intermediates'):
      observe = functools.partial(self.sow, 'intermediates', 'statistics')
    y, cache = recurrent.mix(settings, params, x, segment_ids, cache, observe)
    return y if cache is None else (y, cache)

  @nn.nowrap
  def init_cache(
    self, batch_size: int, max_length: int | None = None, dtype: jnp.dtype | None = None
  ) -> RecurrentCache:
    """The cache before the first token.

    Args:
      batch_size: sequences.
      max_length: ignored: the size of the state does not depend on it.
      dtype: of the convolutions' tails; None: the layer's `dtype`, or float32 if it has none.
    """
    del max_length
    return recurrent.init_cache(self, batch_size, dtype or self.dtype or jnp.float32)


class ResidualDeltaNet(RecurrentLayer, kw_only=True):
  """Residual Delta Net (RDN): a delta-rule state S and a second one, R, that fits what S misses.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    R_t = alpha_t (I - gamma_t k_t k_t^T) R_{t-1} + gamma_t k_t r_t^T,
          r_t = clip(v_t - S_{t-1}^T k_t, -c, c)
    o_t = alpha_t S_{t-1}^T q_t + gamma_t R_t^T q_t

  `residual=False` is Gated DeltaNet; `decay='channel'` puts it on Kimi Delta Attention and
  `decay='none'` on DeltaNet. Attributes: see `Settings`.

  Reference:
    Lai, Kang, Lu, Lin, Zhao: Enhancing Linear Attention with Residual Learning, arXiv:2509.25223.
  """


class ResidualLinearAttention(RecurrentLayer, kw_only=True):
  """Residual Linear Attention (RLA): the same with additive updates of both states.

    S_t = alpha_t S_{t-1} + beta_t k_t v_t^T
    R_t = alpha_t R_{t-1} + gamma_t k_t r_t^T,   r_t = clip(v_t - S_{t-1}^T k_t, -c, c)
    o_t = alpha_t S_{t-1}^T q_t + gamma_t R_t^T q_t

  `residual=False` is simple gated linear attention (sGLA); `decay='channel_sigmoid'` puts it on GLA
  and `decay='fixed'` on RetNet. The paper finds that it diverges without the clip. Attributes: see
  `Settings`.

  Reference:
    Lai, Kang, Lu, Lin, Zhao: Enhancing Linear Attention with Residual Learning, arXiv:2509.25223.
  """

  update: Literal['additive', 'delta'] = 'additive'
