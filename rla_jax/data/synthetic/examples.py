"""A set of examples of one length."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, Int32


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """Inputs and what is to be said at each of their positions.

  Attributes:
    name: of the set, in tables.
    vocab_size: S; all ids are below it.
    tokens: inputs int32 [N, T].
    targets: int32 [N, T]; 0 where `counts` is False.
    counts: whether a position has a target, bool [N, T].
  """

  name: str
  vocab_size: int
  tokens: Int32[np.ndarray, 'N T']
  targets: Int32[np.ndarray, 'N T']
  counts: Bool[np.ndarray, 'N T']

  def __len__(self) -> int:
    """N."""
    return len(self.tokens)

  def first(self, count: int | None) -> 'Examples':
    """The first so many examples; None: all."""
    parts = {name: getattr(self, name)[:count] for name in ('tokens', 'targets', 'counts')}
    return dataclasses.replace(self, **parts)


def distinct(
  rng: np.random.Generator, rows: int, size: int, among: int
) -> Int[np.ndarray, 'rows size']:
  """Ids below `among`, drawn without replacement in every row: Fisher and Yates, all rows at once.

  Raises:
    ValueError: size > among.
  """
  if size > among:
    raise ValueError(f'cannot draw {size} distinct of {among}')
  drawn = np.empty((rows, size), np.int64)
  for start in range(0, rows, 4096):  # Bounds the memory of the deck.
    part = drawn[start : start + 4096]
    deck, row = np.tile(np.arange(among), (len(part), 1)), np.arange(len(part))
    for i in range(size):
      j = rng.integers(i, among, len(part))
      part[:, i] = deck[row, j]
      deck[row, j] = deck[:, i]
  return drawn


def weighted_order(
  rng: np.random.Generator, rows: int, size: int, weights: Float[np.ndarray, ' n']
) -> Int[np.ndarray, 'rows size']:
  """Indices drawn one after the other without replacement, each with chances as their weights.

  Sorting log weights with Gumbel noise is the same as drawing one by one (Efraimidis, Spirakis).
  """
  keys = np.log(weights) + rng.gumbel(size=(rows, len(weights)))
  return np.argsort(-keys, axis=1)[:, :size]
