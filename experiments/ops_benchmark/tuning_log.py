"""What tuning found of every candidate, in a file from which a run that was stopped goes on."""

import dataclasses
import json
import pathlib

from ops_benchmark.problem import Problem
from rla_jax.kernels.residual.gpu import blocks


def named(problem: Problem) -> str:
  """A problem in the log and in messages."""
  shape = f'{problem.batch} x {problem.length} x {problem.heads} x {problem.size}'
  return f'{problem.operation} {shape} {problem.dtype}'


class Log:
  """A line of JSON as it comes, and those of earlier runs of the same versions."""

  def __init__(self, path: pathlib.Path, versions: str):
    self.path, self.versions = path, versions
    self._found: dict[tuple[str, str], dict] = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text() if path.exists() else ''
    for line in text.splitlines():
      try:
        entry = json.loads(line)
      except ValueError:  # a run was killed while it wrote
        continue
      if entry['versions'] == versions:
        self._found[self._name(entry['problem'], entry['blocks'])] = entry
    if text and not text.endswith('\n'):
      path.write_text(text + '\n')

  def get(self, problem: Problem, chosen: blocks.Blocks) -> dict:
    """What is known of a candidate: bytes, milliseconds or error, right; none or some of them."""
    return self._found.get(self._name(named(problem), dataclasses.asdict(chosen)), {})

  def add(self, problem: Problem, chosen: blocks.Blocks, **found) -> None:
    """Adds to what is known."""
    record = dataclasses.asdict(chosen)
    entry = self.get(problem, chosen) | found
    entry |= {'problem': named(problem), 'blocks': record, 'versions': self.versions}
    self._found[self._name(named(problem), record)] = entry
    with open(self.path, 'a') as file:
      file.write(json.dumps(entry) + '\n')

  @staticmethod
  def _name(problem, record):
    return problem, json.dumps(record, sort_keys=True)
