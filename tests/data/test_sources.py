"""Files to documents: every format, every way to name them, every kind of damage."""

import lzma
import random

import pytest

from rla_jax.data import DataConfig, DataError
from rla_jax.data.sources import find_files, hash_files, read_documents
from tests.data.texts import PACK, jsonl, words, write


def read(path, **settings):
  config = DataConfig(path=str(path), **settings)
  return list(read_documents(hash_files(find_files(config.path)), config))


@pytest.mark.parametrize('compression', PACK)
def test_text_file_is_one_document(tmp_path, compression):
  text = '\n'.join(words(9)).encode() + b'\xff\x00\r\n'
  path = write(tmp_path / f'a.txt{compression}', text)
  (document,) = read(path)
  assert document.text == text
  assert document.source == str(path)


@pytest.mark.parametrize('compression', PACK)
@pytest.mark.parametrize('field', ['text', 'body'])
def test_jsonl_line_is_one_document(tmp_path, compression, field):
  path = write(tmp_path / f'a.jsonl{compression}', jsonl(words(9), field))
  found = read(path, text_field=field)
  assert [d.text.decode() for d in found] == words(9)
  assert [d.source for d in found] == [f'{path}:{n}' for n in range(1, 10)]


def test_empty_texts_and_blank_lines_are_left_out(tmp_path):
  path = write(tmp_path / 'a.jsonl', b'\n' + jsonl(['', 'x', '']) + b'  \n' + jsonl(['y']))
  assert [(d.text, d.source) for d in read(path)] == [(b'x', f'{path}:3'), (b'y', f'{path}:6')]


def test_format_overrides_the_suffix(tmp_path):
  path = write(tmp_path / 'a.log', jsonl(['x']))
  assert [d.text for d in read(path)] == [jsonl(['x'])]
  assert [d.text for d in read(path, format='jsonl')] == [b'x']
  path = write(tmp_path / 'a.jsonl', jsonl(['x']))
  assert [d.text for d in read(path, format='text')] == [jsonl(['x'])]


def test_separator_cuts_a_text_file(tmp_path):
  path = write(tmp_path / 'a.txt.gz', b'one\nmore\n%%\ntwo\n%%\n\n%%\nthree')
  found = read(path, document_separator='\n%%\n')
  assert [d.text for d in found] == [b'one\nmore', b'two', b'three']
  assert [d.source for d in found] == [f'{path}:{n}' for n in (1, 4, 8)]


def test_folder_and_glob(tmp_path):
  for name in ('b.txt', 'a.txt', 'sub/c.md', 'sub/d.jsonl', '.hidden/e.txt', 'f.bin'):
    write(tmp_path / name, jsonl([name]))
  names = [p.relative_to(tmp_path).as_posix() for p in find_files(str(tmp_path))]
  assert names == ['a.txt', 'b.txt', 'sub/c.md', 'sub/d.jsonl']
  assert [p.name for p in find_files(f'{tmp_path}/*.txt')] == ['a.txt', 'b.txt']
  assert [p.name for p in find_files(f'{tmp_path}/**/[cf].*')] == ['f.bin', 'c.md']
  # A name that looks like a pattern but exists is a name.
  write(tmp_path / 'g[1].txt', b'x')
  assert [p.name for p in find_files(f'{tmp_path}/g[1].txt')] == ['g[1].txt']


def test_standard_library():
  files = find_files(None)
  assert files == sorted(files) == find_files(None)
  names = {path.name for path in files}
  assert {'argparse.py', 'dataclasses.py', '__init__.py'} <= names
  assert not {'cp1252.py', 'pip'} & names
  assert not any({'test', 'tests', 'site-packages'} & set(path.parts[-4:]) for path in files)
  assert sum(path.stat().st_size for path in files) > 5_000_000


def test_hash_files(tmp_path):
  (file,) = hash_files([write(tmp_path / 'a.txt', b'abc')])
  assert file.size == 3
  assert file.sha256 == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'


ERRORS = {
  'missing file': ('no.txt', None, "file '.*no.txt' does not exist"),
  'glob without match': ('no*.txt', None, "glob '.*' matches no file"),
  'folder without text': ('', ('f.bin', b'x'), 'holds no file ending in .txt'),
  'not JSON': ('a.jsonl', ('a.jsonl', jsonl('ab') + b'{"te\n'), r'a.jsonl:3 is not valid JSON'),
  'cut line': ('a.jsonl', ('a.jsonl', jsonl('ab')[:-5]), r'a.jsonl:2 .* is the file truncated'),
  'no field': ('a.jsonl', ('a.jsonl', b'{"b": 1, "a": 2}'), "1 has no field 'text'.*fields: a, b"),
  'not a string': ('a.jsonl', ('a.jsonl', b'{"text": [1]}'), r"jsonl:1: field 'text' is list"),
  'not an object': ('a.jsonl', ('a.jsonl', b'["text"]'), 'jsonl:1 holds a list, expected an obj'),
  'no text': ('a.jsonl', ('a.jsonl', b'{"text": "\\ud800"}'), "field 'text' has no UTF-8 form"),
  'bytes': ('a.jsonl', ('a.jsonl', b'{"text": "\xff"}'), r'a.jsonl:1 is not valid JSON'),
}


@pytest.mark.parametrize(('path', 'file', 'message'), ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_file_and_line(tmp_path, path, file, message):
  if file is not None:
    (tmp_path / file[0]).write_bytes(file[1])
  with pytest.raises(DataError, match=message):
    read(tmp_path / path)


@pytest.mark.parametrize('compression', ['.xz', '.gz'])
@pytest.mark.parametrize('form', ['.txt', '.jsonl'])
def test_truncated_anywhere(tmp_path, compression, form):
  whole = PACK[compression](jsonl(words(50)))
  path = tmp_path / f'a{form}{compression}'
  for length in {1, 5, 12, *random.Random(0).sample(range(1, len(whole)), 20), len(whole) - 1}:
    path.write_bytes(whole[:length])
    with pytest.raises(DataError, match=f'a{form}{compression}.* truncated or damaged'):
      read(path)


def test_flipped_bits_of_xz_are_found(tmp_path):
  whole = lzma.compress(jsonl(words(50)))
  path = tmp_path / 'a.jsonl.xz'
  rng = random.Random(1)
  for _ in range(40):
    damaged = bytearray(whole)
    damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r'a\.jsonl\.xz'):
      read(path)


def test_damage_names_the_line(tmp_path):
  whole = PACK['.gz'](jsonl([str(random.Random(n).random()) * 500 for n in range(400)]))
  path = tmp_path / 'a.jsonl.gz'
  path.write_bytes(whole[: len(whole) // 2])
  config = DataConfig(path=str(path))
  good = 0
  with pytest.raises(DataError, match='truncated or damaged') as error:
    for _ in read_documents(hash_files([path]), config):
      good += 1
  assert 50 < good < 350
  assert f'a.jsonl.gz:{good + 1} ' in str(error.value)
