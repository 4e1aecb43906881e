import itertools

import numpy as np
import pytest

from rla_jax.data import synthetic
from rla_jax.data.synthetic.examples import distinct, weighted_order
from rla_jax.data.synthetic.mqar import TEST, TRAIN


def solve(tokens, pairs):
  """Answers of somebody who reads the assignments in order and remembers the last of each key."""
  memory = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
  return [memory.get(t, 0) for t in tokens]


@pytest.mark.parametrize('reassigned', [0.0, 0.25, 0.5])
def test_recall_examples_are_as_defined(reassigned):
  length, pairs, size = 64, 8, 50
  found = synthetic.multi_query_recall(3, length, pairs, size, reassigned=reassigned)
  again = round(reassigned * pairs)
  assert found.tokens.shape == (size, length)
  assert found.tokens.min() >= 0 and found.tokens.max() < 8192
  for tokens, targets, counts in zip(found.tokens, found.targets, found.counts, strict=True):
    keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
    assert len(set(keys)) == pairs - again
    assert len(set(values)) == pairs
    assert keys.min() >= 1 and keys.max() < 4096 <= values.min()
    places = np.flatnonzero(counts)
    assert sorted(tokens[places]) == sorted(set(keys))
    assert places.min() >= 2 * pairs and (places % 2 == 0).all()
    assert targets[places].tolist() == [solve(tokens, pairs)[p] for p in places]
    assert (targets[~counts] == 0).all()


def test_reassigned_keys_have_their_last_value():
  found = synthetic.multi_query_recall(0, 64, 8, 200, reassigned=0.5)
  firsts = []
  for tokens in found.tokens:
    memory = {}
    for key, value in zip(tokens[0:16:2], tokens[1:16:2], strict=True):
      memory.setdefault(key, value)
    firsts.append([memory.get(t, 0) for t in tokens])
  lasts = np.array([solve(tokens, 8) for tokens in found.tokens])
  assert (lasts == found.targets)[found.counts].all()
  assert (np.array(firsts) != found.targets)[found.counts].all()


def test_the_based_setting():
  assert sum(count for _, _, count in TRAIN) == 180_000
  assert [(length, pairs) for length, pairs, _ in TEST][-1] == (1024, 256)
  sets = synthetic.based_test(0)
  assert [s.tokens.shape for s in sets] == [(count, length) for length, _, count in TEST]
  assert [int(s.counts.sum()) for s in sets] == [1000 * pairs for _, pairs, _ in TEST]
  for small in sets[:2]:
    assert not {r.tobytes() for r in small.tokens} & {r.tobytes() for r in sets[2].tokens}


def test_seeds():
  a, b, c = (synthetic.multi_query_recall(seed, 32, 4, 5).tokens for seed in (0, 0, 1))
  assert (a == b).all()
  assert (a != c).any()


def test_slots_follow_the_power_law():
  slots, size = 28, 20_000
  found = synthetic.multi_query_recall(1, 2 * slots + 2, 1, size, vocab_size=64)
  place = (found.counts.argmax(axis=1) - 2) // 2
  weights = np.arange(1, slots + 1) ** (0.01 - 1)
  want = weights / weights.sum()
  got = np.bincount(place, minlength=slots) / size
  assert np.abs(got - want).max() < 5 * np.sqrt(0.25 / size)
  assert got[0] > 10 * got[-1]


def test_weighted_order_draws_one_by_one():
  weights = np.array([0.6, 0.3, 0.1])
  drawn = weighted_order(np.random.default_rng(0), 40_000, 2, weights)
  for a, b in itertools.permutations(range(3), 2):
    want = weights[a] * weights[b] / (1 - weights[a])
    got = ((drawn[:, 0] == a) & (drawn[:, 1] == b)).mean()
    assert got == pytest.approx(want, abs=0.0125)


def test_distinct_is_uniform_and_distinct():
  drawn = distinct(np.random.default_rng(0), 5000, 3, 4)
  assert all(len(set(row)) == 3 for row in drawn)
  share = np.bincount(drawn[:, 2], minlength=4) / 5000
  np.testing.assert_allclose(share, 0.25, atol=0.035)
  with pytest.raises(ValueError, match='cannot draw 5 distinct of 4'):
    distinct(np.random.default_rng(0), 1, 5, 4)


def test_parity_by_hand():
  found = synthetic.parity(0, 20, 4)
  for tokens, targets in zip(found.tokens, found.targets, strict=True):
    assert targets.tolist() == [int(sum(tokens[: t + 1])) % 2 for t in range(20)]


def test_modular_arithmetic_by_hand():
  found = synthetic.modular_arithmetic(0, 30, 4, modulus=5)
  for tokens, targets in zip(found.tokens, found.targets, strict=True):
    state = 0
    for token, target in zip(tokens, targets, strict=True):
      n = int(token) % 5
      state = {0: state + n, 1: state - n, 2: state * n}[int(token) // 5] % 5
      assert target == state


def test_permutations_by_hand():
  found = synthetic.permutations(0, 12, 3)
  group = list(itertools.permutations(range(5)))
  assert found.vocab_size == 120
  for tokens, targets in zip(found.tokens, found.targets, strict=True):
    state = tuple(range(5))
    for token, target in zip(tokens, targets, strict=True):
      state = tuple(group[token][i] for i in state)
      assert group[target] == state


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: synthetic.multi_query_recall(0, 63, 4, 1), 'length is 63 and pairs is 4'),
    (lambda: synthetic.multi_query_recall(0, 64, 17, 1), 'at least 4'),
    (lambda: synthetic.multi_query_recall(0, 64, 4, 1, reassigned=0.6), 'reassigned is 0.6'),
    (lambda: synthetic.multi_query_recall(0, 64, 4, 0), 'num_examples is 0'),
    (lambda: synthetic.parity(0, 0, 1), 'length is 0'),
    (lambda: synthetic.modular_arithmetic(0, 4, 1, modulus=1), 'modulus is 1'),
    (lambda: synthetic.permutations(0, 4, 1, size=7), 'size is 7; expected 2 to 6'),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
