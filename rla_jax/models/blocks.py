"""The blocks of the language model: pre-norm mixer and SwiGLU, and the group that is scanned."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rla_jax.layers import registry
from rla_jax.layers.norms import LayerNorm, RMSNorm
from rla_jax.models.config import ModelConfig
from rla_jax.shapes import Array, Float


class SwiGLU(nn.Module):
  """Gated feed-forward, y = (silu(x W_gate) * x W_up) W_down.

  Attributes:
    config: sizes D and F, dtypes, initialisation.

  Reference:
    Shazeer: GLU Variants Improve Transformer, arXiv:2002.05202.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    c = self.config
    D, F = c.model_dim, c.ffn_dim

    def kernel(name, shape):
      init = nn.initializers.normal(c.init_std)
      return self.param(name, init, shape, c.param_dtype).astype(x.dtype)

    gate_BTF = jnp.dot(x, kernel('gate_proj', (D, F)))
    up_BTF = jnp.dot(x, kernel('up_proj', (D, F)))
    return _gated_product(gate_BTF, up_BTF, kernel('down_proj', (F, D)))


# Elementwise work: cheaper to repeat, in one pass with its own gradient, than to keep.
@jax.checkpoint
def _gated_product(gate_BTF, up_BTF, kernel_FD):
  return jnp.dot(jax.nn.silu(gate_BTF) * up_BTF, kernel_FD)


class Block(nn.Module):
  """x + mixer(norm(x)), then x + ffn(norm(x)).

  Attributes:
    config: of the model.
    layer: name of the mixer.
  """

  config: ModelConfig
  layer: str

  @nn.compact
  def __call__(self, x, segment_ids, cache):
    c = self.config
    mixer = make_mixer(c, self.layer, name='mixer')

    h_BTD = make_norm(c, 'mixer_norm')(x)
    if cache is None:
      h_BTD = mixer(h_BTD, segment_ids)
    else:
      h_BTD, cache = mixer(h_BTD, segment_ids, cache)
    x = x + h_BTD
    if c.ffn_dim is not None:
      x = x + SwiGLU(c, name='ffn')(make_norm(c, 'ffn_norm')(x))
    return x, cache


class Group(nn.Module):
  """One repetition of the pattern: what the model scans over.

  Attributes:
    config: of the model.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x, segment_ids, caches):
    new = []
    for i, layer in enumerate(self.config.pattern):
      cache = None if caches is None else caches[i]
      x, cache = Block(self.config, layer, name=f'block_{i}')(x, segment_ids, cache)
      new.append(cache)
    return x, None if caches is None else tuple(new)


def make_mixer(config: ModelConfig, layer: str, name: str | None = None) -> nn.Module:
  """The mixer of a block, a layer of the registry with the model's settings."""
  common = {
    'dtype': jnp.dtype(config.dtype),
    'param_dtype': jnp.dtype(config.param_dtype),
    'kernel_init': nn.initializers.normal(config.init_std),
  }
  return registry.make(layer, module_name=name, **(common | config.attributes_of(layer)))


def make_norm(config: ModelConfig, name: str | None = None) -> nn.Module:
  """A norm of the residual stream."""
  kind = {'rms': RMSNorm, 'layer': LayerNorm}[config.norm]
  return kind(eps=config.norm_eps, param_dtype=config.param_dtype, name=name)
