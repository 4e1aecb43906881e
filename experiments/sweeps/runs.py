"""The runs of a sweep, one after the other: what is finished is skipped, the rest is trained."""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from rla_jax.evaluation.provenance import commit, today
from rla_jax.evaluation.results import read_rows, write_rows
from rla_jax.training.progress import duration
from sweeps.ahead import Ahead
from sweeps.curves import Curves
from sweeps.ensemble import Ensemble, Member


@dataclasses.dataclass(frozen=True)
class Run:
  """Members that train together.

  Attributes:
    folder: for their state and their curves.
    config: of every member, but for learning rate and seed.
    members: the members.
    columns: what the table says of all of them.
  """

  folder: pathlib.Path
  config: ConfigDict
  members: tuple[Member, ...]
  columns: dict[str, object]


def digest(members: Sequence[Member], overrides: Sequence[str]) -> str:
  """Tells other members or overrides apart, in the name of a folder."""
  text = json.dumps([[m.learning_rate, m.seed] for m in members] + list(overrides))
  return hashlib.sha256(text.encode()).hexdigest()[:6]


def deadline(seconds: float | None) -> Callable[[], bool]:
  """Whether so many seconds have passed since this call; never, without a number."""
  begin = time.perf_counter()
  return lambda: seconds is not None and time.perf_counter() - begin > seconds


# Trains a run, or goes on, with those after it that are not finished: (curves, whether it ended).
Trainer = Callable[[Run, Sequence[Run]], tuple[list[dict], bool]]


def train(
  plan: Sequence[Callable[[], Run | None]],
  curves: Curves,
  trainer: Trainer,
  late: Callable[[], bool],
) -> None:
  """Trains what is not finished, in order, until it is late.

  Args:
    plan: each gives a run; None while what comes before it has to end first.
    curves: of the sweep.
    trainer: trains one.
    late: whether no other may begin.
  """
  for number, find in enumerate(plan):
    run, place = find(), f'{number + 1} of {len(plan)}'
    if curves.of(run.folder, run.columns, run.members) is not None:
      print(f'{run.folder.name}: finished before, {place}')
      continue
    if late():
      print(f'{run.folder.name}: left for another call, the budget is spent')
      return
    start = time.perf_counter()
    later = [r for after in plan[number + 1 :] if (r := after())]
    later = [r for r in later if curves.of(r.folder, r.columns, r.members) is None]
    found, finished = trainer(run, later)
    rows = [{**run.columns, **row, **_provenance(run.folder)} for row in found]
    if not finished:
      if rows:
        write_rows(run.folder / 'unfinished.csv', rows)
      print(f'{run.folder.name}: stopped, the budget is spent; the same command goes on')
      return
    write_rows(run.folder / 'curve.csv', rows)
    for name in ('state.npz', 'unfinished.csv'):
      (run.folder / name).unlink(missing_ok=True)
    # No time for the others: they differ in size, members and what of them is done.
    seconds = time.perf_counter() - start
    print(f'{run.folder.name}: finished in {duration(seconds)}, {place}', flush=True)


class Together:
  """A trainer: the members of a run in one program, while those of the next ones are compiled."""

  def __init__(self, evaluate_every: int, late: Callable[[], bool], ahead: int = 1):
    """Takes what all runs share.

    Args:
      evaluate_every: epochs between evaluations.
      late: whether to stop; asked after every epoch.
      ahead: runs whose programs are compiled at once, while another trains.
    """
    self._evaluate_every, self._late, self._count = evaluate_every, late, ahead
    self._ahead = Ahead(_build)

  def __call__(self, run: Run, later: Sequence[Run]) -> tuple[list[dict], bool]:
    """The members' curves, and whether they came to the end."""
    for other in (run, *later[: self._count - 1]):
      self._ahead.begin(other.folder, other)
    ensemble = self._ahead.take(run.folder, run)
    for other in later[: self._count]:
      self._ahead.begin(other.folder, other)
    first, ready = ensemble.epoch, time.perf_counter()

    def report(line):
      done, now = ensemble.epoch - first, time.perf_counter() - ready
      left = now / done * (ensemble.epochs - ensemble.epoch)
      print(f'{run.folder.name}  {line}  {duration(now)}, ETA {duration(left)}', flush=True)

    finished = ensemble.run(self._evaluate_every, report, self._late)
    return ensemble.curve, finished


def _build(run: Run) -> Ensemble:
  start = time.perf_counter()
  ensemble = Ensemble(run.config, run.members, run.folder)
  seconds = duration(time.perf_counter() - start)
  print(f'{run.folder.name}: data drawn and programs compiled in {seconds}', flush=True)
  return ensemble


def _provenance(folder: pathlib.Path) -> dict[str, str]:
  """When and where a run ended, and with what; the commits of all calls that had a part in it."""
  unfinished = folder / 'unfinished.csv'
  earlier = read_rows(unfinished)[0]['commit'].split() if unfinished.exists() else []
  return {
    'date': today(), 'device': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'jax': jax.__version__, 'commit': ' '.join(dict.fromkeys([*earlier, commit() or 'unknown'])),
  }
