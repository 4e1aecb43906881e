"""What the loop costs: its steps against the same compiled step, called again and again.

The loop also fetches batches and results, reports, and looks for signals and failed saves. On a
device all of that happens while the step runs, so both should take the same time.
"""

import contextlib
import statistics
import tempfile
import time
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from rla_jax.training import train


class Overhead(NamedTuple):
  """Seconds a step, round by round.

  Attributes:
    loop: in the training loop.
    bare: of the compiled step alone, on one batch, right after these.
  """

  loop: tuple[float, ...]
  bare: tuple[float, ...]

  @property
  def parts(self) -> list[float]:
    """What the loop adds in each round, as a part of the bare step."""
    return [loop / bare - 1 for loop, bare in zip(self.loop, self.bare, strict=True)]

  @property
  def part(self) -> float:
    """Their median."""
    return statistics.median(self.parts)

  def __str__(self):
    loop, bare = map(statistics.median, self)
    return (
      f'{1e3 * loop:.3f} ms a step in the loop, {1e3 * bare:.3f} ms bare: {100 * self.part:+.2f} % '
      f'(medians of {len(self.loop)} rounds, {100 * min(self.parts):+.2f} to '
      f'{100 * max(self.parts):+.2f} %)'
    )


def measure_overhead(config: ConfigDict, steps: int) -> Overhead:
  """Trains in the loop; after every round of steps it calls the same step as many times bare.

  A round is `log_every` steps, so each has one log line. Both kinds of it are neighbours in time:
  what else the machine does, or a clock that falls as it warms up, is the same for both. The first
  round does not count. Nothing is evaluated or saved, and what is written goes to a temporary
  folder.

  Args:
    config: of a run; its steps, and what happens between steps, are replaced.
    steps: of each kind, in rounds that are whole; at least one round.
  """
  config = config.copy_and_resolve_references()
  size = min(config.log_every, steps)
  rounds = 1 + steps // size
  config.steps = rounds * (size + _MORE) + 1
  config.optimizer.warmup_steps = 0
  config.eval_every = config.checkpoint_every = 10 * config.steps
  with (
    tempfile.TemporaryDirectory() as folder,
    _watched(size, rounds) as (loops, bares),
    contextlib.suppress(_Measured),
  ):
    train.train_and_evaluate(config, folder)
  return Overhead(tuple(loops[1:]), tuple(bares[1:]))


_MORE = 2  # Steps of the loop in a round that are not timed: the first one and the last.


class _Measured(Exception):
  """Ends the loop."""


@contextlib.contextmanager
def _watched(size, rounds):
  """Notes when each step of the loop has finished, and lets it wait for bare ones after a round."""
  times, loops, bares = [], [], []
  compile_step, count = train.compile_step, train.Progress.count

  def compiling(function, abstract, batch, progress):
    step, calls = compile_step(function, abstract, batch, progress), 0

    def called(state, batch):
      nonlocal calls
      if calls == size + _MORE:
        # The first of these times is that of a step before the round, or of a pipeline that fills.
        loops.append((times[-1] - times[-1 - size]) / size)
        state, seconds = _bare(step, state, batch, size)
        bares.append(seconds)
        if len(bares) == rounds:
          raise _Measured
        progress.pause()  # Its clock is that of the loop.
        times.clear()
        calls = 0
      calls += 1
      return step(state, batch)

    return called

  def counting(self, step, tokens):
    times.append(time.perf_counter())
    count(self, step, tokens)

  train.compile_step, train.Progress.count = compiling, counting
  try:
    yield loops, bares
  finally:
    train.compile_step, train.Progress.count = compile_step, count


def _bare(step, state, batch, steps):
  """The state after one step more than are timed, and seconds a step."""
  state, _ = step(state, batch)
  jax.block_until_ready(state)
  begin = time.perf_counter()
  for _ in range(steps):
    state, _ = step(state, batch)
  jax.block_until_ready(state)
  return state, (time.perf_counter() - begin) / steps
