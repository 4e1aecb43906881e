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
  """Seconds a step, medians over the rounds.

  Attributes:
    loop: in the training loop.
    bare: of the compiled step alone, on one batch.
  """

  loop: float
  bare: float

  def __str__(self):
    part = self.loop / self.bare - 1
    return (
      f'{1e3 * self.loop:.3f} ms a step in the loop, {1e3 * self.bare:.3f} ms bare: '
      f'{100 * part:+.2f} %'
    )


def measure_overhead(config: ConfigDict, steps: int, rounds: int = 3) -> Overhead:
  """Trains for so many steps in the loop, and as many times calls the step it compiled; in turns.

  Nothing is evaluated or saved on the way, and what is written goes to a temporary folder.

  Args:
    config: of a run; its steps, and what happens between steps, are replaced.
    steps: of each measurement; the first tenth does not count.
    rounds: measurements of each kind.
  """
  config = config.copy_and_resolve_references()
  config.steps = steps
  config.optimizer.warmup_steps = 0
  config.eval_every = config.checkpoint_every = 10 * steps
  config.eval_tokens = 1
  loops, bares = [], []
  for _ in range(rounds):
    with tempfile.TemporaryDirectory() as folder, _watched() as (times, kept):
      state = train.train_and_evaluate(config, folder).state
    skipped = max(1, steps // 10)
    loops.append((times[-1] - times[skipped]) / (len(times) - 1 - skipped))
    bares.append(_bare(kept['step'], state, kept['batch'], steps, skipped))
  return Overhead(statistics.median(loops), statistics.median(bares))


def _bare(step, state, batch, steps, skipped):
  for number in range(steps):
    if number == skipped:
      jax.block_until_ready(state)
      begin = time.perf_counter()
    state, _ = step(state, batch)
  jax.block_until_ready(state)
  return (time.perf_counter() - begin) / (steps - skipped)


@contextlib.contextmanager
def _watched():
  """Notes when each step of the loop has finished, and the step that it compiles with a batch."""
  times, kept = [], {}
  compile_step, count = train.compile_step, train.Progress.count

  def compiling(function, abstract, batch, progress):
    kept['step'], kept['batch'] = compile_step(function, abstract, batch, progress), batch
    return kept['step']

  def counting(self, step, tokens):
    times.append(time.perf_counter())
    count(self, step, tokens)

  train.compile_step, train.Progress.count = compiling, counting
  try:
    yield times, kept
  finally:
    train.compile_step, train.Progress.count = compile_step, count
