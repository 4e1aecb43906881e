"""CSV files that grow from run to run: a row is replaced when its case is measured again."""

import csv
import datetime
import importlib.metadata
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
STAMP = ('date', 'commit', 'versions', 'command')


class Table:
  """One CSV file, its rows known by some of its columns."""

  def __init__(self, path: pathlib.Path, key: tuple[str, ...]):
    """Reads the file if it is there."""
    self.path, self.key = path, key
    self.rows: list[dict] = []
    if path.exists():
      with path.open(newline='') as file:
        self.rows = list(csv.DictReader(file))

  def find(self, case: dict) -> list[dict]:
    """Rows of a case: all that agree with it in the key's columns."""
    return [row for row in self.rows if self._same(row, case)]

  def replace(self, case: dict, rows: list[dict]) -> None:
    """Puts rows in the place of those that the case had, and writes the file."""
    kept = [row for row in self.rows if not self._same(row, case)]
    self.rows = kept + [{name: str(x) for name, x in row.items()} for row in rows]
    names = list(dict.fromkeys(name for row in self.rows for name in row))
    with self.path.open('w', newline='') as file:
      writer = csv.DictWriter(file, names, restval='', lineterminator='\n')
      writer.writeheader()
      writer.writerows(self.rows)

  def _same(self, row, case):
    return all(row[name] == str(case[name]) for name in self.key)


def stamp(commit: str) -> dict[str, str]:
  """What every row says of its origin."""
  versions = ', '.join(f'{name} {_version(name)}' for name in ('jax', 'libtpu'))
  command = ' '.join(['python', *sys.argv])
  return dict(zip(STAMP, (datetime.date.today().isoformat(), commit, versions, command)))


def commit_of(*paths: str) -> str:
  """The last commit that changed any of the paths; '-changed' where the tree differs from it."""
  last = _git('log', '-1', '--format=%h', '--', *paths)
  return last + '-changed' * bool(_git('status', '--porcelain', '--', *paths))


def _git(*arguments) -> str:
  done = subprocess.run(['git', *arguments], cwd=ROOT, text=True, capture_output=True)
  return done.stdout.strip()


def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return 'not installed'
