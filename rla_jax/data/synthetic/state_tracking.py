"""State tracking: at every position, the state after all inputs so far.

Linear recurrences need negative eigenvalues for these (beta in (0, 2)), and several steps a token
or layers for groups that are not solvable, such as S5.

Reference:
  Grazzi et al.: Unlocking State-Tracking in Linear RNNs through Negative Eigenvalues,
  arXiv:2411.12537; Merrill et al.: The Illusion of State in State-Space Models, arXiv:2404.08819.
"""

import itertools

import numpy as np

from rla_jax.data.synthetic.examples import Examples


def parity(seed: int, length: int, num_examples: int) -> Examples:
  """Inputs 0 and 1; the target is whether there were an odd number of ones."""
  rng = _rng(seed, length, num_examples)
  tokens = rng.integers(0, 2, (num_examples, length))
  return _examples(f'parity L{length}', 2, tokens, np.cumsum(tokens, axis=1) % 2)


def modular_arithmetic(seed: int, length: int, num_examples: int, modulus: int = 5) -> Examples:
  """Inputs are operations on a number modulo m that starts at 0; the target is the number.

  Token j m + n is + n for j = 0, - n for j = 1, times n for j = 2; n in 0 .. m - 1.

  Raises:
    ValueError: modulus < 2, or a size < 1.
  """
  if modulus < 2:
    raise ValueError(f'modulus is {modulus}; expected at least 2')
  rng = _rng(seed, length, num_examples)
  tokens = rng.integers(0, 3 * modulus, (num_examples, length))
  operation, number = np.divmod(tokens, modulus)
  targets, state = np.empty_like(tokens), np.zeros(num_examples, np.int64)
  for t in range(length):
    n = number[:, t]
    state = np.choose(operation[:, t], (state + n, state - n, state * n)) % modulus
    targets[:, t] = state
  return _examples(f'mod {modulus} L{length}', 3 * modulus, tokens, targets)


def permutations(seed: int, length: int, num_examples: int, size: int = 5) -> Examples:
  """Inputs are permutations of `size` things (S5: 120 of them); the target is their product.

  Permutations are numbered in lexicographic order, 0 is the identity; the product of p1 .. pt maps
  i to pt(.. p2(p1(i))).

  Raises:
    ValueError: size not in 2 .. 6, or a size < 1.
  """
  if not 2 <= size <= 6:
    raise ValueError(f'size is {size}; expected 2 to 6')
  rng = _rng(seed, length, num_examples)
  group = np.array(list(itertools.permutations(range(size))))
  weights = size ** np.arange(size)
  number = np.full(size**size, -1)
  number[group @ weights] = np.arange(len(group))
  # product[a, b]: a first, then b.
  product = number[np.take_along_axis(group[None], group[:, None], axis=2) @ weights]
  tokens = rng.integers(0, len(group), (num_examples, length))
  targets, state = np.empty_like(tokens), np.zeros(num_examples, np.int64)
  for t in range(length):
    state = product[state, tokens[:, t]]
    targets[:, t] = state
  return _examples(f'S{size} L{length}', len(group), tokens, targets)


def _rng(seed, length, num_examples) -> np.random.Generator:
  if length < 1 or num_examples < 1:
    raise ValueError(
      f'length is {length} and num_examples is {num_examples}; expected at least 1'
    )
  return np.random.default_rng(seed)


def _examples(name, vocab_size, tokens, targets) -> Examples:
  counts = np.ones(tokens.shape, bool)
  return Examples(name, vocab_size, tokens.astype(np.int32), targets.astype(np.int32), counts)
