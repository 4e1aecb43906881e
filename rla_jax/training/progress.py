"""What a run says while it trains: one line a logged step, a bar on a terminal."""

import sys
import time
from typing import NamedTuple

from tqdm import tqdm


class Rate(NamedTuple):
  """How fast a run is.

  Attributes:
    tokens_per_second: targets a second.
    step_seconds: seconds a step.
    seconds: that were measured.
    seconds_left: until the end of the run.
  """

  tokens_per_second: float
  step_seconds: float
  seconds: float
  seconds_left: float


class Progress:
  """Log lines and a progress bar on stderr, and the clock behind tokens/s.

  The clock stops in `pause`, so that evaluations, checkpoints and compilation do not count.
  """

  def __init__(self, steps: int, silent: bool = False):
    """For a run of so many steps; silent: of a process that another speaks for."""
    self._steps, self._silent = steps, silent
    disable = True if silent else None
    self._bar = tqdm(total=steps, unit='step', disable=disable, dynamic_ncols=True)
    self._clock: float | None = None
    self._tokens, self._counted, self._seconds = 0, 0, 0.0
    self._step = 0

  def say(self, text: str) -> None:
    """Prints lines above the bar."""
    if self._silent:
      return
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()

  def count(self, step: int, tokens: int) -> None:
    """Notes that a step has finished, with so many tokens."""
    now = time.perf_counter()
    if self._clock is not None:
      self._seconds += now - self._clock
      self._tokens += tokens
      self._counted += 1
    self._clock = now
    self._step = step
    self._bar.update(step - self._bar.n)

  def pause(self) -> None:
    """Stops the clock until the next step has finished."""
    self._clock = None

  def rate(self) -> Rate | None:
    """The speed since the last call.

    None if no step has been timed since: the clock stands until the first step after a pause.
    """
    if not self._seconds:
      return None
    speed = self._tokens / self._seconds
    step = self._seconds / self._counted
    found = Rate(speed, step, self._seconds, (self._steps - self._step) * step)
    self._tokens, self._counted, self._seconds = 0, 0, 0.0
    return found

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._bar.close()


def duration(seconds: float) -> str:
  """Seconds as people write them: 42s, 3m07s, 5h02m."""
  seconds = round(seconds)
  if seconds < 60:
    return f'{seconds}s'
  if seconds < 3600:
    return f'{seconds // 60}m{seconds % 60:02d}s'
  return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'
