"""Evaluation sets on disk: jsonl, one object a line, compressed or not, with known columns.

A set is looked for by its name in the data folder, in the folder itself and in `eval/`:
`NAME.jsonl`, `NAME.jsonl.xz` or `NAME.jsonl.gz`. Columns are named as on the Hugging Face hub.
"""

import gzip
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence

from rla_jax.data import DataError

SUFFIXES = ('.jsonl', '.jsonl.xz', '.jsonl.gz')
_OPEN = {'.xz': lzma.open, '.gz': gzip.open}


def check_folder(data_dir: str | os.PathLike) -> pathlib.Path:
  """The data folder as a path.

  Raises:
    DataError: it is none.
  """
  folder = pathlib.Path(data_dir).expanduser()
  if not folder.is_dir():
    raise DataError(f'data_dir {str(data_dir)!r} is no folder')
  return folder


def find(data_dir: str | os.PathLike, *names: str) -> pathlib.Path | None:
  """The file of a set, by the first of its names that is there; None if none is."""
  folder = check_folder(data_dir)
  for name in names:
    for place in (folder, folder / 'eval'):
      for suffix in SUFFIXES:
        if (place / f'{name}{suffix}').is_file():
          return place / f'{name}{suffix}'
  return None


def absent(data_dir: str | os.PathLike, *names: str) -> str:
  """Says that the folder has no set of these names."""
  return f'{data_dir} has no {" or ".join(f"{name}.jsonl" for name in names)} (.xz, .gz)'


def read(
  path: str | os.PathLike,
  columns: Iterable[str] = (),
  values: Mapping[str, Sequence[str]] | None = None,
) -> list[dict]:
  """The objects of a jsonl file.

  Args:
    path: the file; a suffix .xz or .gz is decompressed.
    columns: that every object must have.
    values: what some of these columns may hold, {column: values as JSON}; None: anything.

  Raises:
    DataError: names file and line, and what is missing, damaged, empty or not accepted.
  """
  path = pathlib.Path(path)
  records = []
  try:
    with _OPEN.get(path.suffix, open)(path, 'rt', encoding='utf-8') as file:
      for number, line in enumerate(file, start=1):
        if line.strip():
          records.append(_record(line, f'{path}:{number}', columns, values or {}))
  except OSError as error:
    raise DataError(f'cannot read {path}: {error.strerror or error}') from error
  except (lzma.LZMAError, zlib.error, EOFError, UnicodeDecodeError) as error:
    raise DataError(f'{path} is unreadable, truncated or damaged: {error}') from error
  if not records:
    raise DataError(f'{path} holds no records')
  return records


def _record(
  line: str, where: str, columns: Iterable[str], values: Mapping[str, Sequence[str]]
) -> dict:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise DataError(f'{where} is not valid JSON: {error}') from error
  if not isinstance(record, dict):
    raise DataError(f'{where} holds a {type(record).__name__}, expected an object')
  for column in columns:
    if column not in record:
      raise DataError(f'{where} has no column {column!r}; its columns: {", ".join(record)}')
  for column, accepted in values.items():
    found = json.dumps(record[column])  # As JSON, 1, 1.0, "1" and true are four values.
    if found not in accepted:
      raise DataError(f'{where} has {column} {found:.50}; expected one of {", ".join(accepted)}')
  return record
