"""The baselines against a count written out by hand, and against what must hold of them."""

import collections
import itertools
import lzma
import math

import numpy as np
import pytest

from rla_jax.data import DataConfig, baselines, load_documents
from tests.data.texts import documents, words


def by_hand(train, held_out):
  """Unigram and bigram bits per byte, one symbol at a time."""
  ones, twos = collections.Counter(), collections.Counter()
  for text in train:
    symbols = [256, *text, 256]
    for x, y in itertools.pairwise(symbols):
      ones[y] += 1
      twos[x, y] += 1
  total = sum(ones.values())
  bits_1 = bits_2 = 0.0
  for text in held_out:
    symbols = [256, *text, 256]
    for x, y in itertools.pairwise(symbols):
      p = (ones[y] + 1) / (total + 257)
      seen = sum(n for (a, _), n in twos.items() if a == x)
      different = sum(a == x for a, _ in twos)
      bits_1 -= math.log2(p)
      bits_2 -= math.log2((twos[x, y] + different * p) / (seen + different) if seen else p)
  size = sum(map(len, held_out))
  return bits_1 / size, bits_2 / size


@pytest.mark.parametrize('block', [1, 100, 1 << 22])
def test_by_hand(monkeypatch, block):
  monkeypatch.setattr(baselines, '_BLOCK_BYTES', block)
  train = [text.encode() for text in words(12)]
  held_out = [text.encode() for text in words(4, seed=1)] + [b'\x00never seen\xff']
  found = baselines.measure(documents(train), documents(held_out))
  unigram, bigram = by_hand(train, held_out)
  assert found.unigram == pytest.approx(unigram, rel=1e-12)
  assert found.bigram == pytest.approx(bigram, rel=1e-12)
  assert found.num_bytes == sum(map(len, held_out))


def test_probabilities_sum_to_one():
  counts = baselines.bigram_counts(documents(words(30)))
  np.testing.assert_allclose(baselines.unigram_probabilities(counts).sum(), 1, rtol=1e-12)
  bigram = baselines.bigram_probabilities(counts)
  assert (bigram > 0).all()
  np.testing.assert_allclose(bigram.sum(axis=1), 1, rtol=1e-12)


def test_xz_is_of_the_held_out_documents_alone():
  rng = np.random.default_rng(0)
  noise = [rng.bytes(5000), rng.bytes(5000)]
  found = baselines.measure(documents(noise), documents(noise))
  assert 8 < found.xz < 8.1  # Noise does not compress, and what is in train does not help.
  found = baselines.measure(documents(noise), documents([b'a' * 10_000]))
  stream = lzma.compress(b'a' * 10_000, preset=9 | lzma.PRESET_EXTREME)
  assert found.xz == 8 * len(stream) / 10_000


def test_uniform_bytes_cost_eight_bits():
  texts = [np.random.default_rng(n).bytes(200_000) for n in (0, 1)]
  found = baselines.measure(documents(texts[:1]), documents(texts[1:]))
  assert found.unigram == pytest.approx(8, abs=0.01)


def test_order_on_real_text():
  found = baselines.measure(*load_documents(DataConfig()))
  assert 4 < found.unigram < 6
  assert 2.5 < found.bigram < found.unigram - 0.5
  assert 1 < found.xz < found.bigram


def test_no_text():
  with pytest.raises(ValueError, match='held_out has no text'):
    baselines.measure(documents(['a']), [])
