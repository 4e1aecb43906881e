"""NNX twins of the two layers: the same attributes, parameter names, shapes and mathematics."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from rla_jax.layers import recurrent
from rla_jax.layers.cache import RecurrentCache, check_call
from rla_jax.layers.settings import Settings, check_keys
from rla_jax.shapes import Array, Float, Segments

_ATTRIBUTES = tuple(Settings.__dataclass_fields__)


class DecodeCache(nnx.Cache):
  """A variable that holds the cache of a layer; a call that is given one updates it in place.

  `cache = DecodeCache(layer.init_cache(batch_size))`, then `y = layer(x, cache=cache)`. Being an
  NNX variable it goes through `nnx.jit`, `nnx.scan` and so on, not through `jax.jit`.
  """


class RecurrentLayer(nnx.Module):
  """A layer with the settings of `rla_jax.layers.Settings` and one `nnx.Param` a parameter.

  Args:
    model_dim: width D of the inputs.
    rngs: its `params` stream initialises the parameters.
    **attributes: see `Settings`.

  Raises:
    ValueError: an unknown attribute, with the nearest known name; a bad value.
  """

  defaults: ClassVar[dict[str, Any]] = {}

  def __init__(self, model_dim: int, *, rngs: nnx.Rngs, **attributes):
    check_keys(attributes, _ATTRIBUTES, type(self).__name__)
    self.settings = Settings(**{**self.defaults, **attributes})
    for name, (shape, init) in recurrent.parameters(self.settings, model_dim).items():
      setattr(self, name, nnx.Param(init(rngs.params(), shape, self.settings.param_dtype)))

  def __call__(
    self,
    x: Float[Array, 'B T D'],
    segment_ids: Segments | None = None,
    cache: RecurrentCache | DecodeCache | None = None,
  ) -> Float[Array, 'B T D'] | tuple[Float[Array, 'B T D'], RecurrentCache]:
    """Mixes the tokens of every sequence.

    Args:
      x: inputs [B, T, D], T >= 0.
      segment_ids: int [B, T]; where the id changes, a new document starts. None: one document.
      cache: from `init_cache` or the call before, or a `DecodeCache`.

    Returns:
      y [B, T, D] in `dtype`; given a plain cache, (y, the cache after the last token).

    Raises:
      ValueError: an input of another shape or dtype, a cache of another shape.
    """
    held = cache.get_value() if isinstance(cache, DecodeCache) else cache
    check_call(x, segment_ids, held, self.init_cache)
    names = recurrent.parameters(self.settings, x.shape[-1])
    params = {name: getattr(self, name).get_value() for name in names}
    y, new = recurrent.mix(self.settings, params, x, segment_ids, held)
    if isinstance(cache, DecodeCache):
      cache.set_value(new)
      return y
    return y if cache is None else (y, new)

  def init_cache(self, batch_size: int, dtype: jnp.dtype | None = None) -> RecurrentCache:
    """The cache before the first token, a pytree of arrays.

    Args:
      batch_size: sequences.
      dtype: of the convolutions' tails; None: the layer's `dtype`, or float32 if it has none.
    """
    dtype = dtype or self.settings.dtype or jnp.float32
    return recurrent.init_cache(self.settings, batch_size, dtype)


class ResidualDeltaNet(RecurrentLayer):
  """NNX twin of `rla_jax.layers.ResidualDeltaNet`."""


class ResidualLinearAttention(RecurrentLayer):
  """NNX twin of `rla_jax.layers.ResidualLinearAttention`."""

  defaults: ClassVar[dict[str, Any]] = {'update': 'additive'}


def load_linen_params(layer: RecurrentLayer, params: dict[str, jax.Array]) -> None:
  """Copies the parameters of a Linen layer into its NNX twin.

  Args:
    layer: the twin, with the same attributes.
    params: `variables['params']` of the Linen layer.

  Raises:
    ValueError: names or shapes that differ.
  """
  own = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
  if set(own) != set(params):
    raise ValueError(f'params has {sorted(params)}; expected {sorted(own)}')
  for name, value in params.items():
    if value.shape != own[name].shape:
      raise ValueError(f'params[{name!r}] has shape {value.shape}; expected {own[name].shape}')
    getattr(layer, name).set_value(value)
