"""What stands below a table: where its rows were measured, and what somebody wrote there."""

import pathlib
import textwrap
from collections.abc import Sequence

_HEADING = '## Remarks'


def measured(rows: Sequence[dict], names: Sequence[str]) -> list[str]:
  """Lines that say of every date, commit and device which rows are of it.

  Args:
    rows: the last record of every member.
    names: columns that name what was trained.
  """
  places: dict[str, dict[str, set]] = {}
  for row in rows:
    place = f'{row["date"]}, {row["device"]}, jax {row["jax"]}, commit {row["commit"]}'
    seeds = places.setdefault(place, {}).setdefault(' '.join(str(row[n]) for n in names), set())
    seeds.add(row['seed'])
  lines = []
  for place, found in sorted(places.items()):
    what = ', '.join(
      f'{name} ({"seed" if len(seeds) == 1 else "seeds"} {", ".join(map(str, sorted(seeds)))})'
      for name, seeds in sorted(found.items())
    )
    lines += textwrap.wrap(f'- Measured {place}: {what}.', 100, subsequent_indent='  ')
  return lines


def write_above_remarks(path: pathlib.Path, text: str) -> None:
  """Writes a page; what stands below a line `## Remarks` of one that is there stays."""
  _, heading, remarks = path.read_text().partition(_HEADING) if path.exists() else ('', '', '')
  path.write_text(f'{text}\n{heading}{remarks}' if heading else text)
