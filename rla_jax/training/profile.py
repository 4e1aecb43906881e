"""A trace of a few steps, for XProf, TensorBoard or Perfetto."""

import pathlib

import jax


class Profile:
  """Context in which the steps from `start` on, so many of them, are traced into a folder."""

  def __init__(self, folder: pathlib.Path, start: int | None, steps: int):
    """Nothing is traced yet; start None: nothing ever is."""
    self._folder, self._start = folder, start
    self._end = None if start is None else start + steps
    self._tracing = False

  def before(self, step: int, pending) -> None:
    """Begins or ends the trace if that is due before this step, counted from 1.

    Args:
      step: that comes next.
      pending: what the steps before make: the trace neither begins nor ends without them.
    """
    if step == self._start or step == self._end:
      jax.block_until_ready(pending)
    if step == self._start:
      jax.profiler.start_trace(self._folder)
      self._tracing = True
    elif self._tracing and step == self._end:
      self._stop()

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self._stop()

  def _stop(self):
    if self._tracing:
      jax.profiler.stop_trace()
      self._tracing = False
