"""The tokenised corpus on disk: verified at every start, never half written, never trusted."""

import logging
import random
import threading

import numpy as np
import pytest

from rla_jax.data import DataError, load_tokenizer, store
from tests.data.texts import documents, words

BYTE = load_tokenizer('byte')
KEY = 'a' * 64


def never():
  raise AssertionError('the documents were read although they are cached')
  yield


def same(one: store.TokenStore, other: store.TokenStore) -> bool:
  arrays = ('tokens', 'offsets', 'document_bytes', 'digests', 'held_out')
  return one.sha256 == other.sha256 and all(
    np.array_equal(getattr(one, name), getattr(other, name))
    and getattr(one, name).dtype == getattr(other, name).dtype
    for name in arrays
  )


@pytest.fixture
def cached(tmp_path):
  store.build_or_load(documents(words(50)), BYTE, str(tmp_path), KEY)
  return tmp_path


def test_contents():
  texts = words(50)
  built = store.build(documents(texts), BYTE)
  assert built.tokens.dtype == np.uint16
  for n, text in enumerate(texts):
    ids = built.tokens[built.offsets[n] : built.offsets[n + 1]]
    assert (ids[0], ids[-1]) == (BYTE.bos_id, BYTE.eos_id)
    assert BYTE.decode(ids[1:-1]) == text
  assert built.document_bytes.tolist() == [len(text.encode()) for text in texts]


def test_large_vocabulary_is_stored_in_32_bits():
  class Large(type(BYTE)):
    vocab_size = 70_000
    eos_id = 69_999

  built = store.build(documents(['ab']), Large())
  assert built.tokens.dtype == np.uint32
  assert built.tokens.tolist() == [256, 97, 98, 69_999]


def test_batches_of_any_size_agree(monkeypatch):
  whole = store.build(documents(words(50)), BYTE)
  monkeypatch.setattr(store, '_BATCH_BYTES', 100)
  assert same(store.build(documents(words(50)), BYTE), whole)


def test_cache_equals_memory_and_is_not_built_twice(cached):
  memory = store.build(documents(words(50)), BYTE)
  assert same(store.build_or_load(never(), BYTE, str(cached), KEY), memory)
  assert [path.name for path in cached.iterdir()] == [KEY]


def test_other_key_is_another_entry(cached):
  other = store.build_or_load(documents(words(3)), BYTE, str(cached), 'b' * 64)
  assert same(other, store.build(documents(words(3)), BYTE))


def test_no_documents(tmp_path):
  for _ in range(2):
    empty = store.build_or_load([], BYTE, str(tmp_path), KEY)
    assert same(empty, store.build([], BYTE))
    assert empty.tokens.size == 0


@pytest.mark.parametrize('name', ['tokens.bin', 'documents.npz', 'manifest.json'])
@pytest.mark.parametrize('damage', ['flip', 'truncate', 'extend', 'remove'])
def test_damaged_entry_is_reported_and_built_again(cached, caplog, name, damage):
  path = cached / KEY / name
  content = path.read_bytes()
  rng = random.Random(name + damage)
  for _ in range(6):
    if damage == 'flip':
      flipped = bytearray(content)
      flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
      path.write_bytes(flipped)
    elif damage == 'truncate':
      path.write_bytes(content[: rng.randrange(len(content))])
    elif damage == 'extend':
      path.write_bytes(content + b'\x00')
    else:
      path.unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
      again = store.build_or_load(documents(words(50)), BYTE, str(cached), KEY)
    assert 'tokenising again' in caplog.text
    assert KEY in caplog.text
    assert same(again, store.build(documents(words(50)), BYTE))
    assert path.read_bytes() == content
    assert [p.name for p in cached.iterdir()] == [KEY]


def test_disk_full_leaves_nothing_behind(tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(store.np, 'savez', full)
  with pytest.raises(DataError, match=r"cannot write cache_dir '.*': No space left on device"):
    store.build_or_load(documents(words(5)), BYTE, str(tmp_path), KEY)
  assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(DataError, match='cannot write cache_dir'):
    store.build_or_load(documents(words(5)), BYTE, str(tmp_path / 'file'), KEY)


def test_failure_while_reading_leaves_nothing_behind(tmp_path):
  def broken():
    yield from documents(words(5))
    raise DataError('a.txt:6 is damaged')

  with pytest.raises(DataError, match=r'a\.txt:6'):
    store.build_or_load(broken(), BYTE, str(tmp_path), KEY)
  assert list(tmp_path.iterdir()) == []


def test_processes_may_build_at_once(tmp_path):
  barrier = threading.Barrier(4)
  found = []

  def together():
    barrier.wait()
    yield from documents(words(50))

  def build():
    found.append(store.build_or_load(together(), BYTE, str(tmp_path), KEY))

  threads = [threading.Thread(target=build) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  memory = store.build(documents(words(50)), BYTE)
  assert [same(one, memory) for one in found] == [True] * 4
  assert [p.name for p in tmp_path.iterdir()] == [KEY]


def test_text_that_is_not_utf8_is_named(tmp_path):
  class Strict(type(BYTE)):
    def encode_batch(self, texts):
      return super().encode_batch([text.decode() for text in texts])

  with pytest.raises(DataError, match=r"1 is not UTF-8 \(byte 2 of .*'byte' takes any"):
    store.build(documents([b'ok', b'ab\xff']), Strict())
