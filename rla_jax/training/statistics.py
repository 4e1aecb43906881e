"""What is looked at when a run goes wrong: norms by group of parameters, gates by layer."""

import re

import jax
import jax.numpy as jnp

from rla_jax.models import LanguageModel
from rla_jax.shapes import Array, Float

# Group of a parameter: the first pattern that its path matches.
GROUPS = (
  ('embedding', r'^embedding$'),
  ('head', r'^head$'),
  ('norms', r'(scale|bias)$'),
  ('gates', r'/mixer/(A_log|dt_bias|(beta|gamma|decay\w*)_proj)$'),
  ('mixers', r'/mixer/'),
  ('ffn', r'/ffn/'),
)


def group_of(path: str) -> str:
  """Group of the parameter at a path such as 'blocks/block_0/mixer/q_proj'."""
  return next((name for name, pattern in GROUPS if re.search(pattern, path)), 'others')


def norms(tree, prefix: str) -> dict[str, Float[Array, '']]:
  """Euclidean norm of each group of a tree like the parameters: {'prefix/group': norm}."""
  squares = {}
  for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
    group = group_of(jax.tree_util.keystr(path, simple=True, separator='/'))
    square = jnp.sum(jnp.square(x.astype(jnp.float32)))
    squares[group] = squares[group] + square if group in squares else square
  return {f'{prefix}/{group}': jnp.sqrt(square) for group, square in sorted(squares.items())}


def gate_statistics(
  model: LanguageModel, params, batch: dict[str, Array]
) -> dict[str, Float[Array, '']]:
  """What the recurrent layers sow: {'gates/alpha/00': mean alpha of the first layer, ...}.

  Names are those of `rla_jax.layers.statistics`, numbers those of the model's layers.
  """
  _, sown = model.apply(
    {'params': params}, batch['tokens'], batch['targets'], mask=batch['loss_mask'],
    segment_ids=batch['segment_ids'], method='loss', mutable=['intermediates'],
  )  # fmt: skip
  pattern, found = model.config.pattern, {}
  blocks = sown.get('intermediates', {}).get('blocks', {})
  for block in blocks:
    place = int(block.removeprefix('block_'))
    (values,) = blocks[block]['mixer']['statistics']
    for name, x_R in values.items():
      for repeat in range(x_R.shape[0]):
        found[f'gates/{name}/{repeat * len(pattern) + place:02d}'] = x_R[repeat]
  return found
