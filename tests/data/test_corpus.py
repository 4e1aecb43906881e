"""From a config to two sets of documents: nothing lost, nothing on both sides."""

import json
import logging
import lzma
import subprocess
import sys

import pytest

from rla_jax.data import Corpus, DataConfig, DataError, load_documents
from tests.data.texts import corpus_folder, jsonl, words, write


def texts(corpus: Corpus, side: str) -> list[str]:
  documents = getattr(corpus, side)
  ends = documents.starts + documents.lengths
  return [
    corpus.tokenizer.decode(documents.tokens[start:end])
    for start, end in zip(documents.starts, ends, strict=True)
  ]


def test_all_documents_are_on_one_side(tmp_path):
  config = DataConfig(path=str(corpus_folder(tmp_path)), validation_fraction=0.2)
  corpus = Corpus.load(config)
  train, validation = texts(corpus, 'train'), texts(corpus, 'validation')
  assert sorted(train + validation) == sorted(words(60))
  assert len(validation) == corpus.validation.num_documents > 1
  for side, found in (('train', train), ('validation', validation)):
    documents = getattr(corpus, side)
    assert documents.num_bytes == sum(len(text.encode()) for text in found)
    assert documents.num_tokens == documents.num_bytes + documents.num_documents


@pytest.mark.parametrize('separate', [False, True])
def test_texts_behind_the_corpus(tmp_path, separate):
  config = DataConfig(path=str(corpus_folder(tmp_path)), validation_fraction=0.2)
  if separate:
    path = write(tmp_path / 'v' / 'v.jsonl', jsonl(words(9, seed=1)))
    config = DataConfig(path=f'{tmp_path}/*.xz', validation_path=str(path))
  corpus = Corpus.load(config)
  train, validation = load_documents(config)
  assert [d.text.decode() for d in train] == texts(corpus, 'train')
  assert [d.text.decode() for d in validation] == texts(corpus, 'validation')


def test_seed_of_order_leaves_the_split_alone(tmp_path):
  path = str(corpus_folder(tmp_path))
  one = Corpus.load(DataConfig(path=path, seed=0, validation_fraction=0.2))
  other = Corpus.load(DataConfig(path=path, seed=1, validation_fraction=0.2))
  assert texts(one, 'validation') == texts(other, 'validation')
  other = Corpus.load(DataConfig(path=path, validation_seed=1, validation_fraction=0.2))
  assert texts(one, 'validation') != texts(other, 'validation')


def test_files_may_be_named_and_cut_otherwise(tmp_path):
  write(tmp_path / 'a' / 'all.jsonl', jsonl(words(60)))
  write(tmp_path / 'b' / 'x.jsonl.gz', jsonl(words(60)[:31]))
  write(tmp_path / 'b' / 'y.jsonl.xz', jsonl(words(60)[31:]))
  one, other = (Corpus.load(DataConfig(path=str(tmp_path / name))) for name in 'ab')
  for side in ('train', 'validation'):
    assert texts(one, side) == texts(other, side)


def test_held_out_documents_leave_the_training_set(tmp_path, caplog):
  path = corpus_folder(tmp_path / 'train')
  held_out = words(60)[10:15] + ['elsewhere']
  validation_path = write(tmp_path / 'v.jsonl', jsonl(held_out))
  config = DataConfig(path=str(path), validation_path=str(validation_path))
  with caplog.at_level(logging.WARNING):
    corpus = Corpus.load(config)
  assert '5 of 60 training documents are left out' in caplog.text
  assert sorted(texts(corpus, 'validation')) == sorted(held_out)
  assert texts(corpus, 'train') == words(60)[:10] + words(60)[15:]
  config = DataConfig(path=str(path), validation_path=str(path))
  with pytest.raises(DataError, match='every document of path is also in validation_path'):
    Corpus.load(config)


def test_cache_changes_nothing(tmp_path):
  path, cache = str(corpus_folder(tmp_path / 'text')), tmp_path / 'cache'
  plain = Corpus.load(DataConfig(path=path))
  for _ in range(2):
    cached = Corpus.load(DataConfig(path=path, cache_dir=str(cache)))
    assert cached.sha256 == plain.sha256
    assert texts(cached, 'train') == texts(plain, 'train')
    assert texts(cached, 'validation') == texts(plain, 'validation')
    assert len(list(cache.iterdir())) == 1
  # Another split is of the same tokens; other text is not.
  Corpus.load(DataConfig(path=path, cache_dir=str(cache), validation_seed=1))
  assert len(list(cache.iterdir())) == 1
  write(tmp_path / 'text' / 'more.txt', b'more')
  assert Corpus.load(DataConfig(path=path, cache_dir=str(cache))).sha256 != plain.sha256
  assert len(list(cache.iterdir())) == 2


def test_cache_sees_how_the_text_is_read(tmp_path):
  write(tmp_path / 'text' / 'a.jsonl', jsonl(words(9)))
  base = {'path': f'{tmp_path}/text/a.jsonl', 'cache_dir': str(tmp_path / 'cache')}
  settings = ({}, {'format': 'text'}, {'format': 'text', 'document_separator': '\n'})
  for count, setting in enumerate(settings, start=1):
    Corpus.load(DataConfig(**base, **setting))
    assert len(list((tmp_path / 'cache').iterdir())) == count


@pytest.mark.parametrize('fraction', [0.1, 0.2, 0.3])
def test_end_of_a_lone_document_is_held_out(tmp_path, fraction):
  text = ''.join(f'line {n}\n' for n in range(1000))
  path = write(tmp_path / 'a.txt', text.encode())
  corpus = Corpus.load(DataConfig(path=str(path), validation_fraction=fraction))
  (train,), (validation,) = texts(corpus, 'train'), texts(corpus, 'validation')
  assert train + validation == text
  assert abs(len(validation) / len(text) - fraction) < 0.01


@pytest.mark.parametrize('name', ['path', 'validation_path'])
def test_empty_corpus(tmp_path, name):
  write(tmp_path / 'text.jsonl', jsonl(words(9)))
  write(tmp_path / 'empty.jsonl', jsonl(['', '']))
  paths = {'path': str(tmp_path / 'text.jsonl'), name: str(tmp_path / 'empty.jsonl')}
  with pytest.raises(DataError, match=rf"the corpus is empty: {name} '.*' holds no text"):
    Corpus.load(DataConfig(**paths))


def test_standard_library_by_default():
  corpus = Corpus.load(DataConfig())
  assert corpus.train.num_bytes > 5_000_000
  assert 0.01 < corpus.validation.num_documents / corpus.train.num_documents < 0.1
  assert Corpus.load(DataConfig()).sha256 == corpus.sha256


def test_shared_samples(data_dir):
  sample = data_dir / 'sample'
  gpt2 = str(data_dir / 'tokenizer' / 'gpt2')
  with lzma.open(sample / 'sample.jsonl.xz') as lines:
    expected = [json.loads(line)['text'] for line in lines]
  corpus = Corpus.load(DataConfig(path=str(sample / 'sample.jsonl.xz'), tokenizer=gpt2))
  assert sorted(texts(corpus, 'train') + texts(corpus, 'validation')) == sorted(expected)
  path = sample / 'tinyshakespeare.txt.xz'
  corpus = Corpus.load(DataConfig(path=str(path), tokenizer=gpt2))
  (train,), (validation,) = texts(corpus, 'train'), texts(corpus, 'validation')
  assert (train + validation).encode() == lzma.decompress(path.read_bytes())


def test_import_touches_no_device_and_the_package_needs_no_grain():
  program = (
    'import sys, rla_jax; assert "grain" not in sys.modules; import rla_jax.data; '
    'from jax._src import xla_bridge; assert not xla_bridge._backends; '
    'assert not {"tokenizers", "sentencepiece"} & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', program], check=True)
