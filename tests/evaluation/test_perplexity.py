import csv
import itertools
import lzma
import math
import re

import numpy as np
import pytest

from rla_jax.data import DataError
from rla_jax.evaluation import lambada, records, wikitext
from rla_jax.evaluation.likelihood import encode_pair, log_likelihoods
from rla_jax.evaluation.perplexity import Text, position_edges, text_loss, windows
from rla_jax.evaluation.results import write_rows
from rla_jax.evaluation.scorer import Scorer
from tests.evaluation import models

TEXTS = ['The quick brown fox\njumps over', 'ä ö', '', 'lazy dogs ' * 9]


def bigram_scorer():
  model, params, log_p = models.bigram()
  return Scorer(model, params, chunk=models.CHUNK, batch_tokens=models.BATCH_TOKENS), log_p


def by_hand(log_p, text):
  ids = [models.TOKENIZER.bos_id, *text.encode()]
  return [-log_p[a, b] for a, b in itertools.pairwise(ids)]


def test_measures_of_a_bigram_model_by_hand():
  scorer, log_p = bigram_scorer()
  found = text_loss(scorer, models.TOKENIZER, [Text(t) for t in TEXTS])
  losses = [by_hand(log_p, text) for text in TEXTS]
  nats, size = sum(map(sum, losses)), sum(len(text.encode()) for text in TEXTS)
  assert (found.documents, found.tokens, found.bytes) == (3, size, size)
  assert found.words == 6 + 2 + 18
  assert found.loss == pytest.approx(nats / size, rel=1e-6)
  assert found.bits_per_byte == pytest.approx(nats / size / math.log(2), rel=1e-6)
  assert math.log(found.word_perplexity) == pytest.approx(nats / 26, rel=1e-6)


def test_loss_by_position_by_hand(tmp_path):
  scorer, log_p = bigram_scorer()
  positions = text_loss(scorer, models.TOKENIZER, [Text(t) for t in TEXTS]).positions
  write_rows(tmp_path / 'positions.csv', positions.rows())
  losses = [by_hand(log_p, text) for text in TEXTS]
  with (tmp_path / 'positions.csv').open() as file:
    rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
  assert sum(row['tokens'] for row in rows) == sum(map(len, losses))
  for row in rows:
    here = [x for doc in losses for x in doc[int(row['first']) : int(row['last']) + 1]]
    assert len(here) == row['tokens']
    assert np.mean(here) == pytest.approx(row['loss'], rel=1e-5)


def test_document_chunks_steps_and_batch_sizes_agree():
  model, params = models.small()
  documents = [Text('to be or not to be, that is the question' * n) for n in (1, 3)]
  found = [
    text_loss(Scorer(model, params, chunk=c, batch_tokens=b), models.TOKENIZER, documents)
    for c, b in ((128, 256), (128, 512), (32, 64), (1, 2))
  ]
  for other in found[1:]:
    assert other.loss == pytest.approx(found[0].loss, rel=1e-4)
    assert other.tokens == found[0].tokens
    np.testing.assert_allclose(other.positions.nats, found[0].positions.nats, rtol=1e-4)


def test_windows_score_every_token_once_with_the_context_they_promise():
  for length, window, stride in ((10, 4, 2), (10, 4, 4), (3, 8, 1), (9, 3, 1), (1, 1, 1)):
    scored = [t for _, first, stop in windows(length, window, stride) for t in range(first, stop)]
    assert scored == list(range(length))
    for start, first, stop in windows(length, window, stride):
      assert stop - start <= window
      assert start == 0 or first - start >= window - stride
  assert windows(7) == [(0, 0, 7)]


def test_windows_see_nothing_before_them():
  model, params = models.small()
  scorer = Scorer(model, params, chunk=64, batch_tokens=256)
  text = 'abcdefghij' * 4
  whole = text_loss(scorer, models.TOKENIZER, [Text(text)])
  cut = text_loss(scorer, models.TOKENIZER, [Text(text)], window=10)
  ids = np.array([models.TOKENIZER.bos_id, *text.encode()], np.int32)
  pieces = [ids[i : i + 11] for i in range(0, 40, 10)]
  want = sum(float(s.nll.sum()) for s in scorer.score(pieces))
  assert cut.nats == pytest.approx(want, rel=1e-6)
  assert cut.tokens == whole.tokens
  assert cut.nats != pytest.approx(whole.nats, rel=1e-4)


def test_position_edges_cover_every_length():
  for length in (1, 2, 3, 17, 1000):
    edges = position_edges(length)
    assert edges[0] == 0
    assert edges[-1] >= length
    assert (np.diff(edges) > 0).all()


def test_bad_windows_and_empty_text():
  scorer, _ = bigram_scorer()
  with pytest.raises(ValueError, match='stride is 9; expected 1 to window, which is 8'):
    text_loss(scorer, models.TOKENIZER, [Text('a')], window=8, stride=9)
  with pytest.raises(DataError, match='no document has a token'):
    text_loss(scorer, models.TOKENIZER, [Text('')])


def test_likelihoods_by_hand():
  scorer, log_p = bigram_scorer()
  pairs = [('the cat', ' sat'), ('', 'x'), ('a ', 'b'), ('q' * 90, ' z')]
  encoded = [encode_pair(models.TOKENIZER, *pair) for pair in pairs]
  assert encoded[2][1].tolist() == list(b' b')
  found = log_likelihoods(scorer, models.TOKENIZER.bos_id, encoded)
  for (context, continuation), got in zip(pairs, found, strict=True):
    whole, size = context + continuation, len(context[len(context.rstrip()) :] + continuation)
    assert got.log_likelihood == pytest.approx(-sum(by_hand(log_p, whole)[-size:]), abs=1e-5)
    ids = [models.TOKENIZER.bos_id, *whole.encode()]
    greedy = [log_p[a].argmax() == b for a, b in itertools.pairwise(ids)]
    assert got.greedy == all(greedy[-size:])


def test_greedy_continuation_is_seen_as_such():
  scorer, log_p = bigram_scorer()
  ids = [ord('a')]
  for _ in range(3):
    ids.append(int(log_p[ids[-1]].argmax()))
  other = [*ids[1:-1], (ids[-1] + 1) % 256]
  found = log_likelihoods(scorer, models.TOKENIZER.bos_id, [(ids[:1], ids[1:]), (ids[:1], other)])
  assert [x.greedy for x in found] == [True, False]


def test_lambada_by_hand():
  scorer, log_p = bigram_scorer()
  texts = ['We met on the stairs', 'He said no more']
  found = lambada.evaluate(scorer, models.TOKENIZER, texts)
  nats = [sum(by_hand(log_p, text)[-len(text.rsplit(' ')[-1]) - 1 :]) for text in texts]
  assert math.log(found.perplexity) == pytest.approx(np.mean(nats), rel=1e-6)
  assert (found.samples, found.accuracy) == (2, 0.0)


def test_wikitext_counts_words_of_the_page_as_it_stands(tmp_path):
  page = ' = A title = \n \n It was 5 @.@ 2 km , or ( so ) he said . \n'
  path = tmp_path / 'wikitext.jsonl.xz'
  with lzma.open(path, 'wt') as file:
    file.write('{"page": "' + page.replace('\n', '\\n') + '"}\n')
  (text,) = wikitext.read(path)
  assert text.words == len(re.split(r'\s+', page))
  assert text.bytes == len(page.encode())
  assert '5.2 km, or (so) he said.' in text.text


def test_wikitext_and_lambada_of_the_data_folder(data_dir):
  pages = wikitext.read(records.find(data_dir, *wikitext.NAMES))
  assert (len(pages), sum(p.words for p in pages)) == (62, 241335)
  assert len(lambada.read(records.find(data_dir, *lambada.NAMES))) == 5153


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('', 'set.jsonl holds no records'),
    ('{"text": 1}\n', r'set.jsonl:1 has no column .page.; its columns: text'),
    ('[1]\n', 'set.jsonl:1 holds a list, expected an object'),
    ('{"page": "x"}\n{"pa', 'set.jsonl:2 is not valid JSON'),
  ],
)
def test_bad_files_give_one_line(tmp_path, content, message):
  path = tmp_path / 'set.jsonl'
  path.write_text(content)
  with pytest.raises(DataError, match=message) as error:
    wikitext.read(path)
  assert '\n' not in str(error.value)


def test_absent_files(tmp_path):
  assert records.find(tmp_path, 'wikitext') is None
  with pytest.raises(DataError, match=r'cannot read .*none.jsonl: No such file'):
    records.read(tmp_path / 'none.jsonl')
  with pytest.raises(DataError, match=r"data_dir '.*/none' is no folder"):
    records.find(tmp_path / 'none', 'wikitext')
  (tmp_path / 'bad.jsonl.xz').write_bytes(b'no xz')
  with pytest.raises(DataError, match=r'bad.jsonl.xz is unreadable, truncated or damaged'):
    records.read(tmp_path / 'bad.jsonl.xz')
