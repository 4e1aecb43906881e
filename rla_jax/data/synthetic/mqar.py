"""Multi-query associative recall (MQAR), as in the experiments of Based.

An example is `k1 v1 .. kN vN`, then slots of two tokens: each key stands once more at the start of
a slot, and there the model has to say its value. Keys are 1 .. S/2 - 1, values S/2 .. S - 1, both
without repetition in an example; slot i = 1, 2, ... is drawn with a chance as a i^(a-1), a = 0.01;
all other places hold uniform noise.

With `reassigned`, that share of the N assignments gives a key that already has a value another one;
the last value counts.

Reference:
  Arora et al.: Zoology, arXiv:2312.04927; Based, arXiv:2402.18668.
"""

import numpy as np

from rla_jax.data.synthetic.examples import Examples, distinct, weighted_order

VOCABULARY = 8192
POWER = 0.01  # a
# (length, assignments, examples)
TRAIN = (
  (64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000),
)  # fmt: skip
TEST = tuple(
  (length, pairs, 1000)
  for length, pairs in (
    (64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)
  )
)  # fmt: skip


def based_train(seed: int, reassigned: float = 0.0) -> list[Examples]:
  """The 180,000 training examples, one set a difficulty."""
  return _sets(seed, 0, TRAIN, reassigned)


def based_test(seed: int, reassigned: float = 0.0) -> list[Examples]:
  """The 7,000 test examples; the score of a model is its accuracy over all of them."""
  return _sets(seed, 1, TEST, reassigned)


def multi_query_recall(
  seed: int | np.random.SeedSequence,
  length: int,
  pairs: int,
  num_examples: int,
  *,
  vocab_size: int = VOCABULARY,
  power: float = POWER,
  reassigned: float = 0.0,
) -> Examples:
  """One set of examples.

  Args:
    seed: of everything random.
    length: tokens T of an example, even.
    pairs: assignments N in the first 2 N tokens.
    num_examples: size of the set.
    vocab_size: S.
    power: a; 1 draws the slots uniformly.
    reassigned: share of the assignments that replace the value of a key.

  Raises:
    ValueError: an argument out of its range, or pairs that do not fit.
  """
  if length % 2 or pairs < 1 or 4 * pairs > length:
    raise ValueError(
      f'length is {length} and pairs is {pairs}; expected an even length, at least 4 * pairs'
    )
  if not 0 <= reassigned <= 0.5:
    raise ValueError(f'reassigned is {reassigned}; expected a number from 0 to 0.5')
  if num_examples < 1 or not power > 0:
    raise ValueError(f'num_examples is {num_examples} and power {power}; expected more than 0')
  rng = np.random.default_rng(seed)
  half = vocab_size // 2
  again = round(reassigned * pairs)
  keys = 1 + distinct(rng, num_examples, pairs - again, half - 1)
  values = half + distinct(rng, num_examples, pairs, vocab_size - half)

  # Which key each assignment is for: all of them once, the first `again` twice, in any order.
  which = np.concatenate((np.arange(pairs - again), np.arange(again)))
  which = np.tile(which, (num_examples, 1))
  if again:
    which = rng.permuted(which, axis=1)
  last = np.empty_like(keys)
  for place in range(pairs):  # Later assignments overwrite earlier ones.
    np.put_along_axis(last, which[:, place : place + 1], values[:, place : place + 1], axis=1)

  context = 2 * pairs
  tokens = rng.integers(0, vocab_size, (num_examples, length))
  tokens[:, 0:context:2] = np.take_along_axis(keys, which, axis=1)
  tokens[:, 1:context:2] = values
  slots = (length - context) // 2
  weights = power * np.arange(1, slots + 1) ** (power - 1)
  places = context + 2 * weighted_order(rng, num_examples, keys.shape[1], weights)
  targets = np.zeros_like(tokens)
  np.put_along_axis(tokens, places, keys, axis=1)
  np.put_along_axis(targets, places, last, axis=1)
  counts = np.zeros(tokens.shape, bool)
  np.put_along_axis(counts, places, True, axis=1)
  return Examples(
    f'L{length} N{pairs}', vocab_size, tokens.astype(np.int32), targets.astype(np.int32), counts
  )


def _sets(seed, side, sizes, reassigned) -> list[Examples]:
  seeds = np.random.SeedSequence((seed, side)).spawn(len(sizes))
  return [
    multi_query_recall(s, length, pairs, count, reassigned=reassigned)
    for s, (length, pairs, count) in zip(seeds, sizes, strict=True)
  ]
