"""Result files that are whole after every row, so that a run that is stopped keeps what it has."""

import csv
import itertools
import os
import pathlib

SAME = ('commit', 'hardware', 'versions')  # rows that agree in these need no second measurement


class Rows:
  """The rows of a CSV file. Every row carries `source`: date, commit, hardware, versions, command.

  Args:
    path: of the file, which is rewritten with every row.
    source: columns that all new rows share.
    identity: columns that say what was measured.
    append: keep the rows that the file has.
    resume: keep them, and let `has` find those of the same commit, hardware and versions.
  """

  def __init__(
    self, path: pathlib.Path, source: dict, identity: tuple[str, ...], *, append=False, resume=False
  ):
    self.path, self.source, self.identity = path, source, identity
    self.rows: list[dict] = []
    self._known: set[tuple] = set()
    if (append or resume) and path.exists():
      with open(path, newline='') as file:
        # A commit may look like a number.
        self.rows = [
          {n: x if n in source else _value(x) for n, x in row.items()}
          for row in csv.DictReader(file)
        ]
    if resume:
      self._known = {self._key(row) for row in self.current()}

  def current(self) -> list[dict]:
    """Rows of this commit, hardware and these versions."""
    return [r for r in self.rows if all(str(r.get(n)) == str(self.source[n]) for n in SAME)]

  def has(self, row: dict) -> bool:
    """Whether an earlier run has measured this."""
    return self._key(row) in self._known

  def add(self, row: dict) -> None:
    """Appends a row and writes the file."""
    self.rows.append(row | self.source)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(itertools.chain.from_iterable(self.rows)))
    unfinished = self.path.with_suffix('.part')
    with open(unfinished, 'w', newline='') as file:
      writer = csv.DictWriter(file, columns)
      writer.writeheader()
      writer.writerows(self.rows)
    os.replace(unfinished, self.path)

  def _key(self, row):
    return tuple(str(row.get(n)) for n in self.identity)


def _value(text: str):
  """A number where the text is one."""
  for kind in (int, float):
    try:
      return kind(text)
    except ValueError:
      pass
  return text
