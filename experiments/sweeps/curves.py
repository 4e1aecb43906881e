"""The curves of a sweep: records of every evaluation of every member that came to its end."""

import pathlib
from collections.abc import Mapping, Sequence

from rla_jax.evaluation.results import read_rows
from rla_jax.training import ConfigError
from sweeps.ensemble import Member

_NAMES = ('task', 'mixer', 'width', 'beta')  # columns that tell runs apart, where there are such


def read_known(path: str | None) -> list[dict]:
  """The records of an earlier sweep's curves.csv; none where there is no path.

  Raises:
    ConfigError: no such file, or no curves in it.
  """
  if not path:
    return []
  if not pathlib.Path(path).is_file():
    raise ConfigError(f'--known={path}: no such file')
  rows = read_rows(pathlib.Path(path))
  if missing := {'epoch', 'learning_rate', 'seed'} - set(rows[0] if rows else ()):
    raise ConfigError(f'--known={path} has no {min(missing)}; expected a curves.csv of a sweep')
  return rows


class Curves:
  """Those in the folder of a sweep, and those that are known from elsewhere."""

  def __init__(self, root: pathlib.Path, known: Sequence[dict] = (), epochs: int | None = None):
    """Takes both.

    Args:
      root: folder of the sweep, which has one folder a run.
      known: records of an earlier sweep with the same settings. Members that did not come to
        `epochs` in it do not count.
      epochs: of a finished run; None: whatever `known` has.
    """
    self._root, self._known = root, {}
    by_member: dict[tuple, list[dict]] = {}
    for row in known:
      by_member.setdefault(_key(row), []).append(row)
    for key, rows in by_member.items():
      if epochs in (None, max(row['epoch'] for row in rows)):
        self._known[key] = rows
    if left := len(by_member) - len(self._known):
      print(f'{left} of {len(by_member)} known members did not come to epoch {epochs}: left out')

  def of(
    self, folder: pathlib.Path, columns: Mapping[str, object], members: Sequence[Member]
  ) -> list[dict] | None:
    """The records of a run; None: it is not finished."""
    path = folder / 'curve.csv'
    if path.exists():
      return read_rows(path)
    found = []
    for member in members:
      rows = self._known.get(
        _key({**columns, 'learning_rate': member.learning_rate, 'seed': member.seed})
      )
      if rows is None:
        return None
      found += rows
    return found

  def all(self) -> list[dict]:
    """All records; a member of the folder replaces the one that was known before."""
    found = [row for path in sorted(self._root.glob('*/curve.csv')) for row in read_rows(path)]
    again = {_key(row) for row in found}
    for key, rows in self._known.items():
      found += [] if key in again else rows
    return [row | {'commit': row.get('commit', 'unknown')} for row in found]


def last(rows: Sequence[dict]) -> list[dict]:
  """The last record of every member."""
  found = {_key(row): row for row in sorted(rows, key=lambda row: row['epoch'])}
  return [found[key] for key in dict.fromkeys(map(_key, rows))]


def _key(row: Mapping[str, object]) -> tuple:
  return tuple(row.get(name) for name in (*_NAMES, 'learning_rate', 'seed'))
