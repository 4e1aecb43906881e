"""Softmax attention with rotary positions and grouped heads: the Transformer baseline."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rla_jax.layers.cache import AttentionCache, check_call, last_segment
from rla_jax.layers.rope import rotate
from rla_jax.layers.settings import DEFAULT_INIT, check_choices, check_positive_int
from rla_jax.layers.split import divide
from rla_jax.ops.segments import count_segments
from rla_jax.shapes import Array, Float, Segments


@dataclasses.dataclass(unsafe_hash=True, kw_only=True)
class AttentionSettings:
  """What an attention layer computes.

  Raises:
    ValueError: a value that is not allowed.
  """

  num_heads: int = 32  # query heads
  num_kv_heads: int | None = None  # key and value heads G, a divisor of num_heads; None: num_heads
  head_dim: int = 128  # size K of a head
  window: int | None = None  # tokens that a token sees, itself included; None: all before it
  rope_base: float | None = 10_000.0  # rotary positions; None: no positions
  dtype: Any = None  # of the products; None: that of x
  param_dtype: Any = jnp.float32  # of the parameters
  kernel_init: Callable = DEFAULT_INIT  # of the projections
  implementation: Literal['xla', 'cudnn', None] = None  # of the products; None: JAX's choice
  exchange_heads: bool = False  # on a split sequence: tokens for heads; False: gather keys, values

  def __post_init__(self):
    check_choices(self)
    check_positive_int('num_heads', self.num_heads)
    check_positive_int('head_dim', self.head_dim)
    check_positive_int('num_kv_heads', self.num_kv_heads, optional=True)
    check_positive_int('window', self.window, optional=True)
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f'num_kv_heads is {self.num_kv_heads}; expected a divisor of num_heads = {self.num_heads}'
      )
    super().__post_init__()

  @property
  def kv_heads(self) -> int:
    """Key and value heads G."""
    return self.num_kv_heads or self.num_heads


class Attention(AttentionSettings, nn.Module, kw_only=True):
  """Causal softmax attention, o_t = sum_{s <= t} softmax_s(q_t^T k_s / sqrt(K)) v_s.

  `layer(x, segment_ids=None) -> y`, and with a cache `layer(x, segment_ids, cache) -> (y, cache)`:
  the contract of `rla_jax.layers.cache`. A token sees those of its own document only. The products
  are those of `jax.nn.dot_product_attention`, which holds all T^2 logits unless
  `implementation='cudnn'` asks for the fused kernel of NVIDIA GPUs (half types only).

  A document that is not finite is masked by a product with zero, so unlike in the recurrent layers
  its NaN do reach the documents packed with it.

  Attributes: see `AttentionSettings`.

  Reference:
    Vaswani et al., arXiv:1706.03762; grouped heads: Ainslie et al., arXiv:2305.13245.
  """

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    segment_ids: Segments | None = None,
    cache: AttentionCache | None = None,
  ) -> Float[Array, 'B T D'] | tuple[Float[Array, 'B T D'], AttentionCache]:
    """Mixes the tokens of every sequence.

    Args:
      x: inputs [B, T, D].
      segment_ids: int [B, T]; where the id changes, a new document starts. None: one document.
      cache: from `init_cache` or the call before. Tokens beyond its max_length come out as NaN.

    Returns:
      y [B, T, D] in `dtype`; with a cache, (y, the cache after the last token).

    Raises:
      ValueError: an input of another shape or dtype, a cache of another shape; a bad attribute.
    """
    # Without a window, whoever made the cache chose how many tokens it holds.
    held = cache.key.shape[1] if isinstance(cache, AttentionCache) else 1
    check_call(x, segment_ids, cache, lambda batch_size: self.init_cache(batch_size, held))
    if x.shape[1] == 0 and cache is not None:
      return x, cache
    dtype = jnp.dtype(self.dtype or x.dtype)
    x_BTD = x.astype(dtype)
    B, T, D = x.shape
    positions_T = jnp.arange(T) + (0 if cache is None else cache.length)

    def project(name, heads):
      shape = D, heads * self.head_dim
      kernel = self.param(f'{name}_proj', self.kernel_init, shape, self.param_dtype)
      return jnp.dot(x_BTD, kernel.astype(dtype)).reshape(B, T, heads, self.head_dim)

    q_BTHK = project('q', self.num_heads)
    k_BTGK = project('k', self.kv_heads)
    v_BTGK = project('v', self.kv_heads)
    if self.rope_base is not None:
      q_BTHK = rotate(q_BTHK, positions_T, self.rope_base).astype(dtype)
      k_BTGK = rotate(k_BTGK, positions_T, self.rope_base).astype(dtype)
    if cache is None:
      o_BTHK = self._attend(q_BTHK, k_BTGK, v_BTGK, segment_ids)
    else:
      o_BTHK, cache = self._attend_cached(q_BTHK, k_BTGK, v_BTGK, segment_ids, cache)
    o_BTX = checkpoint_name(o_BTHK, 'mixer_output').reshape(B, T, -1)
    kernel = self.param('o_proj', self.kernel_init, (o_BTX.shape[-1], D), self.param_dtype)
    y_BTD = jnp.dot(o_BTX, kernel.astype(dtype))
    return y_BTD if cache is None else (y_BTD, cache)

  @nn.nowrap
  def init_cache(
    self, batch_size: int, max_length: int | None = None, dtype: jnp.dtype | None = None
  ) -> AttentionCache:
    """The cache before the first token.

    Args:
      batch_size: sequences.
      max_length: tokens that fit; needed without a window, ignored with one.
      dtype: of keys and values; None: the layer's `dtype`, or float32 if it has none.

    Raises:
      ValueError: no max_length where one is needed.
    """
    if self.window is None and max_length is None:
      raise ValueError('max_length is None; expected the number of tokens that the cache must hold')
    size = max_length if self.window is None else self.window - 1
    dtype = dtype or self.dtype or jnp.float32
    kept = jnp.zeros((batch_size, size, self.kv_heads, self.head_dim), dtype)
    none = jnp.full((batch_size, size), -1, jnp.int32)
    first = jnp.zeros(batch_size, jnp.int32)
    return AttentionCache(kept, kept, none, first, first, jnp.int32(0))

  @nn.nowrap
  def _attend(self, q_BTHK, k_BTGK, v_BTGK, segment_ids_BT):
    division = divide(*q_BTHK.shape[:2])
    if division is None or division.seq is None:
      return self._attend_whole(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)
    if self.exchange_heads:
      return division.attend_by_heads(self._attend_whole, q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)
    return division.attend(
      q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, self.window, self.implementation
    )  # fmt: skip

  @nn.nowrap
  def _attend_whole(self, q_BTHK, k_BTGK, v_BTGK, segment_ids_BT):
    mask = None
    if segment_ids_BT is not None:
      documents_BT = count_segments(segment_ids_BT)
      mask = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    local = None if self.window is None else (self.window - 1, 0)
    return jax.nn.dot_product_attention(
      q_BTHK, k_BTGK, v_BTGK, mask=mask, is_causal=True, local_window_size=local,
      implementation=self.implementation,
    )  # fmt: skip

  @nn.nowrap
  def _attend_cached(self, q_BTHK, k_BTGK, v_BTGK, segment_ids_BT, cache):
    T = q_BTHK.shape[1]
    documents_BT = cache.count(segment_ids_BT, T)
    new = k_BTGK.astype(cache.key.dtype), v_BTGK.astype(cache.value.dtype), documents_BT
    old = cache.key, cache.value, cache.documents
    length, capacity = cache.length, cache.key.shape[1]
    query_T = jnp.arange(T)
    if self.window is None:
      kept = tuple(
        jax.lax.dynamic_update_slice_in_dim(o, n, length, axis=1) for o, n in zip(old, new)
      )
      key_S, seen = jnp.arange(capacity), kept
      age_TS = (length + query_T)[:, None] - key_S[None]
    else:
      seen = tuple(jnp.concatenate([o, n], axis=1) for o, n in zip(old, new))
      kept = tuple(x[:, T:] for x in seen)
      age_TS = (capacity + query_T)[:, None] - jnp.arange(capacity + T)[None]
    visible_TS = age_TS >= 0
    if self.window is not None:
      visible_TS &= age_TS < self.window
    same_BTS = documents_BT[:, :, None] == seen[2][:, None]
    mask = (same_BTS & visible_TS[None])[:, None]
    o_BTHK = jax.nn.dot_product_attention(
      q_BTHK, seen[0].astype(q_BTHK.dtype), seen[1].astype(q_BTHK.dtype), mask=mask,
      implementation=self.implementation,
    )  # fmt: skip
    if self.window is None:
      # A full cache would overwrite its end: better no answer than a wrong one.
      fits_T = length + T <= capacity
      o_BTHK = jnp.where(fits_T, o_BTHK, jnp.nan)
    segment = last_segment(segment_ids_BT, cache)
    cache = AttentionCache(*kept, documents_BT[:, -1], segment, length + T)
    return o_BTHK, cache


class SlidingWindowAttention(Attention, kw_only=True):
  """Attention to the last `window` tokens, the current one included; its cache holds no more.

  Attributes: see `AttentionSettings`.

  Reference:
    Beltagy, Peters, Cohan: Longformer, arXiv:2004.05150.
  """

  window: int | None = 2048
