"""Everything that changes the data changes the fingerprint, and nothing else does."""

import json
import random
import shutil

import pytest

from rla_jax.data import Corpus, DataConfig, DataError, check_fingerprint, fingerprint
from tests.data.texts import corpus_folder, jsonl, words, write


def of(**settings):
  config = DataConfig(**settings)
  return fingerprint(config, Corpus.load(config))


@pytest.fixture
def path(tmp_path):
  return str(corpus_folder(tmp_path / 'a'))


CHANGES = {
  'seed': ({'seed': 1}, {'seed', 'order'}),
  'batch_size': ({'batch_size': 16}, {'batch_size'}),
  'seq_len': ({'seq_len': 64}, {'seq_len'}),
  'validation_seed': ({'validation_seed': 1}, {'split'}),
  'validation_fraction': ({'validation_fraction': 0.5}, {'split'}),
}


@pytest.mark.parametrize(('change', 'entries'), CHANGES.values(), ids=CHANGES.keys())
def test_settings(path, change, entries):
  saved, current = of(path=path), of(path=path, **change)
  differing = {name for name in saved if saved[name] != current[name]}
  sizes = {'train_documents', 'validation_documents'} if 'split' in entries else set()
  assert entries | {'digest'} <= differing <= entries | {'digest'} | sizes
  with pytest.raises(DataError, match='not those of the checkpoint') as error:
    check_fingerprint(saved, current)
  for name in entries:
    line = f'{name}: {saved[name]} in the checkpoint, {current[name]} now'
    assert line in str(error.value)
  assert 'digest' not in str(error.value)


def test_tokenizer(path, tmp_path):
  from tokenizers import ByteLevelBPETokenizer

  bpe = ByteLevelBPETokenizer()
  bpe.train_from_iterator(words(60), vocab_size=300, special_tokens=['<|endoftext|>'])
  bpe.save(str(tmp_path / 't.json'))
  saved, current = of(path=path), of(path=path, tokenizer=str(tmp_path / 't.json'))
  assert saved['tokenizer'] != current['tokenizer']
  assert saved['tokens'] != current['tokens']
  assert saved['files'] == current['files']


def test_one_byte_of_the_text(path, tmp_path):
  saved = of(path=path)
  text = words(60)
  write(tmp_path / 'a' / 'corpus.jsonl.xz', jsonl([text[0][:-1] + '!', *text[1:]]))
  current = of(path=path)
  assert saved['files'] != current['files']
  assert saved['tokens'] != current['tokens']


def test_damage_of_plain_text(tmp_path):
  text = '\n'.join(words(60)).encode()
  path = write(tmp_path / 'a.txt', text)
  saved = of(path=str(path), document_separator='\n')
  rng = random.Random(0)
  damaged = [text[: rng.randrange(1000, len(text))] for _ in range(10)]
  for _ in range(60):
    flipped = bytearray(text)
    flipped[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    damaged.append(bytes(flipped))
  for content in damaged:
    path.write_bytes(content)
    with pytest.raises(DataError, match=r'files: .* in the checkpoint'):
      check_fingerprint(saved, of(path=str(path), document_separator='\n'))


def test_what_does_not_matter(path, tmp_path):
  saved = of(path=path)
  shutil.copytree(path, tmp_path / 'elsewhere')
  moved = of(path=f'{tmp_path}/elsewhere/*.xz')
  threads = of(path=path, num_threads=5, prefetch_batches=2)
  cached = [of(path=path, cache_dir=str(tmp_path / 'cache')) for _ in range(2)]
  for same in (moved, threads, *cached, json.loads(json.dumps(saved))):
    assert same == saved
    check_fingerprint(saved, same)


def test_entry_that_is_missing(path):
  current = of(path=path)
  saved = {name: value for name, value in current.items() if name != 'order'}
  with pytest.raises(DataError, match='order: absent in the checkpoint'):
    check_fingerprint(saved, current)
