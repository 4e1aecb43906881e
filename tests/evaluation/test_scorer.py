import numpy as np
import pytest
from flax.core import freeze

from rla_jax.evaluation.scorer import Scorer
from tests.evaluation import models


def sequences(lengths, vocabulary=models.TOKENIZER.vocab_size, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(0, vocabulary, n + 1).astype(np.int32) for n in lengths]


def difference(a, b):
  assert [x.nll.shape for x in a] == [x.nll.shape for x in b]
  return max((np.abs(x.nll - y.nll).max(initial=0) for x, y in zip(a, b, strict=True)), default=0)


def test_matches_the_probabilities_of_a_bigram_model():
  model, params, log_p = models.bigram()
  texts = sequences([0, 1, 5, 33, 70])
  found = Scorer(model, params, chunk=models.CHUNK, batch_tokens=models.BATCH_TOKENS).score(texts)
  for tokens, scores in zip(texts, found, strict=True):
    want = -log_p[tokens[:-1], tokens[1:]]
    np.testing.assert_allclose(scores.nll, want, rtol=0, atol=1e-5)
    assert (scores.greedy == (log_p[tokens[:-1]].argmax(-1) == tokens[1:])).all()


@pytest.mark.parametrize('pattern', [('rdn',), ('attention',), ('rla', 'sliding_window_attention')])
def test_whole_chunked_and_token_by_token_agree(pattern):
  options = {'sliding_window_attention': {'window': 8}} if len(pattern) > 1 else {}
  model, params = models.small(pattern, layer_options=freeze(options))
  texts = sequences([100, 37, 64])
  whole = Scorer(model, params, chunk=100, batch_tokens=300).score(texts)
  for chunk in (32, 1):
    pieces = Scorer(model, params, chunk=chunk, batch_tokens=3 * chunk)
    assert difference(whole, pieces.score(texts)) < 1e-4


def test_batch_size_does_not_matter():
  model, params = models.small()
  texts = sequences([3, 50, 7, 40, 90, 12])
  few = Scorer(model, params, chunk=64, batch_tokens=64).score(texts)
  many = Scorer(model, params, chunk=64, batch_tokens=256).score(texts)
  assert difference(few, many) < 1e-5
  for a, b in zip(few, many, strict=True):
    assert (a.greedy == b.greedy).all()


def test_few_shapes():
  model, params = models.small()
  scorer = Scorer(model, params, chunk=64, batch_tokens=256)
  scorer.score(sequences(range(1, 200, 9)))
  scorer.score(sequences(range(1, 300, 31)))
  assert scorer.shapes == {(8, 32, False), (4, 64, False), (4, 64, True)}


@pytest.mark.parametrize(
  ('tokens', 'message'),
  [
    ([], r'sequences\[1\] has shape \(0,\)'),
    ([1.5], 'dtype float64'),
    ([[1, 2]], r'shape \(1, 2\)'),
    ([0, 258], r'ids from 0 to 258; expected ids in \[0, 258\)'),
  ],
)
def test_refuses_what_is_no_sequence(tokens, message):
  with pytest.raises(ValueError, match=message):
    Scorer(*models.small()).score([np.array([1, 2]), np.array(tokens)])


@pytest.mark.parametrize('name', ['chunk', 'batch_tokens'])
def test_refuses_sizes_below_one(name):
  with pytest.raises(ValueError, match=f'{name} is 0; expected an int >= 1'):
    Scorer(*models.small(), **{name: 0})
