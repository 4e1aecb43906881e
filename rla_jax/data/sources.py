"""Documents from plain text and jsonl files, compressed or not."""

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import lzma
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator, Sequence

try:
  from tqdm import tqdm
except ModuleNotFoundError as error:
  raise ModuleNotFoundError("tqdm is not installed: pip install -e '.[train]'") from error

from rla_jax.data.config import DataConfig

TEXT_SUFFIXES = ('.txt', '.text', '.md', '.rst', '.py')
JSONL_SUFFIXES = ('.jsonl', '.ndjson')
COMPRESSIONS = {'.xz': lzma.open, '.gz': gzip.open}
_UNREADABLE = (lzma.LZMAError, zlib.error, EOFError, OSError)
# No source text of the standard library: its tests, generated character tables (an eighth of all
# bytes), what others installed beside it, and the sysconfig data, which describe the machine.
_STDLIB_SKIPPED = frozenset(
  ('test', 'tests', 'idle_test', 'encodings', 'site-packages', 'dist-packages', '__pycache__')
)


class DataError(ValueError):
  """The data cannot be used as they are; the message names the file and what is wrong."""


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
  """One document.

  Attributes:
    text: UTF-8 bytes.
    source: `file` or `file:line`, for messages.
    held_out: that it is held out was decided when it was read.
  """

  text: bytes
  source: str
  held_out: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class SourceFile:
  """A file to read, with the size in bytes and SHA-256 it has on disk (compressed as it is)."""

  path: pathlib.Path
  size: int
  sha256: str


def find_files(path: str | None) -> list[pathlib.Path]:
  """Lists the files of a file, folder or glob, sorted by path.

  A folder stands for all its files of a known suffix, at any depth, hidden ones left out.

  Args:
    path: file, folder or glob (`**` reaches any depth); None is the Python standard library.

  Returns:
    At least one path.

  Raises:
    DataError: nothing is there.
  """
  if path is None:
    return _standard_library()
  root = pathlib.Path(path).expanduser()
  if root.is_file():
    return [root]
  if root.is_dir():
    suffixes = TEXT_SUFFIXES + JSONL_SUFFIXES
    files = [p for p in root.rglob('*') if p.is_file() and _bare_suffix(p) in suffixes]
    files = [p for p in files if not any(s.startswith('.') for s in p.relative_to(root).parts)]
    if not files:
      raise DataError(
        f"folder {path!r} holds no file ending in {', '.join(suffixes)} (or these with .xz, .gz); "
        "give a glob to choose others"
      )
    return sorted(files)
  if glob.has_magic(str(root)):
    files = [pathlib.Path(p) for p in glob.glob(str(root), recursive=True)]
    files = sorted(p for p in files if p.is_file())
    if not files:
      raise DataError(f'glob {path!r} matches no file (working directory {pathlib.Path.cwd()})')
    return files
  raise DataError(f'file {path!r} does not exist (working directory {pathlib.Path.cwd()})')


def _standard_library() -> list[pathlib.Path]:
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  files = sorted(
    p
    for p in root.rglob('*.py')
    if not _STDLIB_SKIPPED.intersection(p.relative_to(root).parts)
    and not p.name.startswith('_sysconfigdata')
    and p.is_file()
  )
  if not files:
    raise DataError(f'no *.py files of the standard library in {root}; give a path to other text')
  return files


def hash_files(paths: Sequence[pathlib.Path]) -> list[SourceFile]:
  """Sizes and SHA-256 of the files as they lie on disk."""
  files = []
  for path in paths:
    with _opened(path) as stream:
      digest = hashlib.file_digest(stream, 'sha256').hexdigest()
      files.append(SourceFile(path, stream.tell(), digest))
  return files


def read_documents(files: Sequence[SourceFile], config: DataConfig) -> Iterator[Document]:
  """Yields the documents of the files in order; empty ones are left out.

  Shows a progress bar after a second, where stderr is a terminal.

  Raises:
    DataError: a file cannot be read, is truncated or damaged, or a jsonl line is not what it
      should be. Names file and line.
  """
  total = sum(f.size for f in files)
  with tqdm(
    total=total, unit='B', unit_scale=True, desc='tokenising', delay=1, disable=None
  ) as bar:
    for file in files:
      read = _read_jsonl if _is_jsonl(file.path, config.format) else _read_text
      with _opened(file.path) as raw:
        position = 0
        for document in read(raw, file.path, config):
          if document.text:
            yield document
          bar.update(raw.tell() - position)
          position = raw.tell()
        bar.update(file.size - position)


def _read_text(raw, path: pathlib.Path, config: DataConfig) -> Iterator[Document]:
  try:
    text = _decompressed(raw, path).read()
  except _UNREADABLE as error:
    raise DataError(f'{path} is unreadable, truncated or damaged: {error}') from error
  if config.document_separator is None:
    yield Document(text, str(path))
    return
  line = 1
  separator = config.document_separator.encode()
  for part in text.split(separator):
    yield Document(part, f'{path}:{line}')
    line += part.count(b'\n') + separator.count(b'\n')


def _read_jsonl(raw, path: pathlib.Path, config: DataConfig) -> Iterator[Document]:
  number = 0
  try:
    for number, line in enumerate(_decompressed(raw, path), start=1):
      if not line.isspace():
        yield Document(_text_of(line, f'{path}:{number}', config.text_field), f'{path}:{number}')
  except _UNREADABLE as error:
    raise DataError(f'{path}:{number + 1} is unreadable, truncated or damaged: {error}') from error


def _text_of(line: bytes, where: str, field: str) -> bytes:
  try:
    record = json.loads(line)
  except ValueError as error:
    hint = '' if line.endswith(b'\n') else ' (the last line: is the file truncated?)'
    raise DataError(f'{where} is not valid JSON: {error}{hint}') from error
  if not isinstance(record, dict):
    raise DataError(f'{where} holds a {type(record).__name__}, expected an object')
  if field not in record:
    names = ', '.join(sorted(record)) or 'none'
    raise DataError(f'{where} has no field {field!r} (text_field); its fields: {names}')
  text = record[field]
  if not isinstance(text, str):
    raise DataError(f'{where}: field {field!r} is {type(text).__name__}, expected a string')
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise DataError(f'{where}: field {field!r} has no UTF-8 form: {error}') from error


def _is_jsonl(path: pathlib.Path, format: str) -> bool:
  return format == 'jsonl' or (format == 'auto' and _bare_suffix(path) in JSONL_SUFFIXES)


def _bare_suffix(path: pathlib.Path) -> str:
  return (path.with_suffix('') if path.suffix in COMPRESSIONS else path).suffix


def _decompressed(raw, path: pathlib.Path):
  if path.suffix not in COMPRESSIONS:
    return raw
  # The explicit buffer makes line iteration several times faster than the decompressors' own.
  return io.BufferedReader(COMPRESSIONS[path.suffix](raw), 1 << 20)


def _opened(path: pathlib.Path):
  try:
    return path.open('rb')
  except OSError as error:
    raise DataError(f'cannot read {path}: {error.strerror}') from error
