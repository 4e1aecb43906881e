"""Settings of the language model."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from flax.core import FrozenDict, freeze, unfreeze

from rla_jax.layers import registry
from rla_jax.layers.settings import check_choices, check_keys, check_positive_int

Remat = Literal['none', 'full', 'dots', 'names', 'both']


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Settings of a `LanguageModel`; hashable, so it may be a static argument.

  Raises:
    ValueError: a value that is not allowed or does not go with the others; an unknown layer or an
      unknown attribute of one, with the nearest known name.
  """

  vocab_size: int  # tokens S of the vocabulary
  num_layers: int = 16  # a multiple of the pattern's length
  model_dim: int = 2048  # width D of the residual stream
  ffn_dim: int | None = 8192  # width F of the SwiGLU; None: blocks without one
  pattern: tuple[str, ...] = ('rdn',)  # layers by name (rla_jax.layers.registry), repeated
  num_heads: int = 16  # heads of every layer, unless layer_options says otherwise
  head_dim: int = 128  # key size of a head, likewise
  layer_options: Mapping[str, Mapping[str, Any]] = FrozenDict()  # {layer: {attribute: value}}

  tie_embeddings: bool = False  # the output head is the embedding's transpose
  init_std: float = 0.02  # of embedding and projections, normally distributed (paper: 0.006)
  norm: Literal['rms', 'layer'] = 'rms'  # before mixers and feed-forwards, and at the end
  norm_eps: float = 1e-6  # of all norms
  embedding_dropout: float = 0.0  # share of the embedding's numbers that training sets to zero
  dtype: str = 'bfloat16'  # of activations and products; logits, norms, gates, states: float32
  param_dtype: str = 'float32'  # of the parameters

  remat: Remat = 'full'  # what the backward pass recomputes; see models/remat.py
  unroll_layers: bool = False  # compile each layer for itself: fewer copies, slower compilation
  loss_chunk: int | None = None  # positions whose logits exist at a time in the loss; None: all
  chunk_size: int | None = None  # tokens of a chunk in recurrent layers; None: the best known
  implementation: str | tuple[str, ...] | None = None  # of the operators; None: platform's best
  exchange_heads: bool = False  # mesh axis seq: all tokens of a share of the heads on each device

  def __post_init__(self):
    if isinstance(self.pattern, str):
      raise ValueError(f'pattern is {self.pattern!r}; expected a sequence of layer names')
    object.__setattr__(self, 'pattern', tuple(self.pattern))
    object.__setattr__(self, 'layer_options', freeze(_plain(self.layer_options)))
    if isinstance(self.implementation, list):
      object.__setattr__(self, 'implementation', tuple(self.implementation))
    _check(self)

  @classmethod
  def from_dict(cls, values: Mapping[str, Any]) -> 'ModelConfig':
    """Config of a mapping, such as an ml_collections ConfigDict.

    Raises:
      ValueError: an unknown key, with the nearest known one; as the class.
    """
    check_keys(values, [field.name for field in dataclasses.fields(cls)], 'ModelConfig')
    return cls(**values)

  def to_dict(self) -> dict[str, Any]:
    """Plain Python values: `from_dict(config.to_dict()) == config`."""
    values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    return values | {'layer_options': unfreeze(self.layer_options)}

  def attributes_of(self, layer: str) -> dict[str, Any]:
    """Attributes that a layer of the pattern is made with."""
    common = {
      'num_heads': self.num_heads,
      'head_dim': self.head_dim,
      'model_dim': self.model_dim,
      'norm_eps': self.norm_eps,
      'chunk_size': self.chunk_size,
      'implementation': self.implementation,
      'exchange_heads': self.exchange_heads,
    }
    known = registry.attributes(layer)
    if 'chunk_size' not in known:  # attention: its implementations have other names
      del common['implementation']
    shared = {name: value for name, value in common.items() if name in known}
    return {**shared, **self.layer_options.get(layer, {})}


def _check(c: ModelConfig) -> None:
  check_choices(c)
  for name in ('vocab_size', 'num_layers', 'model_dim', 'num_heads', 'head_dim'):
    check_positive_int(name, getattr(c, name))
  for name in ('ffn_dim', 'loss_chunk', 'chunk_size'):
    check_positive_int(name, getattr(c, name), optional=True)
  if not c.pattern or c.num_layers % len(c.pattern):
    raise ValueError(
      f'num_layers is {c.num_layers}; expected a multiple of the length of pattern = {c.pattern}'
    )
  for name in ('dtype', 'param_dtype'):
    value = getattr(c, name)
    try:
      floating = jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
      floating = False
    if not isinstance(value, str) or not floating:
      raise ValueError(f"{name} is {value!r}; expected a floating dtype such as 'bfloat16'")
  for name in ('init_std', 'norm_eps'):
    if not getattr(c, name) > 0:
      raise ValueError(f'{name} is {getattr(c, name)}; expected a number > 0')
  if not 0 <= c.embedding_dropout < 1:
    raise ValueError(f'embedding_dropout is {c.embedding_dropout}; expected 0 <= p < 1')
  check_keys(c.layer_options, c.pattern, 'layer_options: the pattern')
  for layer in c.pattern:
    registry.make(layer, **c.attributes_of(layer))


def _plain(tree):
  """Nested mappings as dicts and lists as tuples, so that the config can be hashed."""
  if hasattr(tree, 'items'):
    return {key: _plain(value) for key, value in tree.items()}
  return tuple(tree) if isinstance(tree, list) else tree
