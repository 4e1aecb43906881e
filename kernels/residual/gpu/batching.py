"""vmap for kernel calls: the mapped axis joins the batch axis."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def fold_into_batch(function: Callable) -> Callable:
  """Gives `function` a vmap rule. All its arrays, in and out, must lead with the batch axis.

  A kernel call knows no vmap of its own. The rule is applied again for every further vmap. An
  argument that is not mapped is broadcast, so map what you can outside.
  """
  mapped = jax.custom_batching.custom_vmap(function)

  @mapped.def_vmap
  def rule(axis_size, in_batched, *args):
    def merge(x, is_batched):
      x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
      return x.reshape(-1, *x.shape[2:])

    def split(x):
      return x.reshape(axis_size, -1, *x.shape[1:])

    outputs = jax.tree.map(split, mapped(*jax.tree.map(merge, args, tuple(in_batched))))
    return outputs, jax.tree.map(lambda _: True, outputs)

  return mapped
