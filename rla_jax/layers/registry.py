"""The layers by the name that a config calls them."""

import dataclasses
from typing import Any

from rla_jax.layers import attention, base_conv, baselines, residual
from rla_jax.layers.settings import check_keys

LAYERS = {
  'rdn': residual.ResidualDeltaNet,
  'rla': residual.ResidualLinearAttention,
  'sgla': baselines.SimpleGLA,
  'retnet': baselines.RetNet,
  'mamba2': baselines.Mamba2,
  'gla': baselines.GLA,
  'delta_net': baselines.DeltaNet,
  'gdn': baselines.GatedDeltaNet,
  'kda': baselines.KimiDeltaAttention,
  'two_state': baselines.TwoStateDeltaNet,
  'attention': attention.Attention,
  'sliding_window_attention': attention.SlidingWindowAttention,
  'base_conv': base_conv.BaseConv,
  'identity': base_conv.Identity,
}


def attributes(name: str) -> tuple[str, ...]:
  """Names of the attributes of a layer.

  Raises:
    ValueError: an unknown layer, with the nearest known name.
  """
  check_keys([name], LAYERS, 'the registry of layers')
  fields = (field.name for field in dataclasses.fields(LAYERS[name]))
  return tuple(field for field in fields if field not in ('parent', 'name'))


def make(name: str, **options: Any):
  """The Linen layer of a name, e.g. `make('rdn', num_heads=4, head_dim=64)`.

  Args:
    name: one of `LAYERS`.
    **options: attributes of the layer; `name` is the module's name in Linen's sense if given as
      `module_name`.

  Raises:
    ValueError: an unknown layer or attribute, with the nearest known name; a bad value.
  """
  module_name = options.pop('module_name', None)
  check_keys(options, attributes(name), f'layer {name!r}')
  return LAYERS[name](**options, name=module_name)
