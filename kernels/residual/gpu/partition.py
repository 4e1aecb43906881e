"""Kernel calls on many devices: each runs on its own sequences and heads, and nothing is gathered.

XLA knows nothing of the inside of a custom call, so it would gather all inputs on every device,
silently. A partitioning rule tells it that batch and heads are independent, and it is XLA that
knows where the inputs lie: no mesh has to be named, and the rule holds under `jit` with any
sharding. Inside `shard_map` the call is local already and the rule does nothing. A sharded time
axis is gathered: the recurrence runs along it.
"""

from collections.abc import Callable

import jax
from jax.experimental.custom_partitioning import custom_partitioning


def over_batch_and_heads(function: Callable, inputs, outputs) -> Callable:
  """Gives `function` a partitioning rule over batch and heads.

  Args:
    function: takes and returns arrays, and None where an array is left out.
    inputs: for each argument the letters of its dimensions, as 'BTGK', in the same tree. B, H and G
      are split; G are the groups of H // G heads that share queries and keys.
    outputs: the same for what it returns.
  """

  def run(*arguments):  # custom_partitioning does not take functions with keywords
    return function(*arguments)

  def call(*arguments):
    letters = _letters(inputs, arguments)
    sizes = {}
    for names, x in zip(letters, jax.tree.leaves(arguments), strict=True):
      sizes |= dict(zip(names, x.shape, strict=True))
    results = _letters(outputs, jax.eval_shape(function, *arguments))
    rule, options = _rule(letters, results, sizes)
    split = custom_partitioning(run)
    # Heads and groups are the only factors of a compound dimension, so their sizes are given.
    split.def_partition(partition=partition, sharding_rule=rule, **options)
    return split(*arguments)

  def partition(mesh, arguments, results):
    def shardings(tree):
      return jax.tree.map(lambda x: x.sharding, tree)

    return mesh, run, shardings(results), tuple(shardings(arguments))

  return call


def _letters(names, values) -> list[str]:
  """Letters of the arrays that are there."""
  is_none = lambda x: x is None  # noqa: E731
  found = jax.tree.map(
    lambda name, x: None if x is None else name, names, values, is_leaf=is_none
  )
  return jax.tree.leaves(found)


def _rule(inputs, outputs, sizes):
  """Rule for the partitioner, and its options."""
  G, H = sizes.get('G', sizes['H']), sizes['H']
  grouped = 1 < G < H
  kept: list[str] = []

  def factor(letter):
    if letter == 'B':
      return 'b'
    if letter == 'H':
      return '(g r)' if grouped else 'h'
    if letter == 'G' and G > 1:
      return 'g' if grouped else 'h'
    kept.append(f'x{len(kept)}')  # a factor of its own that is never split
    return kept[-1]

  sides = [', '.join(' '.join(map(factor, x)) for x in side) for side in (inputs, outputs)]
  options = {'need_replication_factors': tuple(kept)} | ({'r': H // G} if grouped else {})
  return ' -> '.join(sides), options
