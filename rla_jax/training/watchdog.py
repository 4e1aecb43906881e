"""A deadline for every step: a run that stands still ends, with one line that says where."""

import faulthandler
import os
import sys
import threading
import time

STUCK = 75  # Exit status, EX_TEMPFAIL of sysexits.h: starting again may help.


class Watchdog:
  """Context in which something has to happen every so many seconds, or the process ends.

  A peer that is stuck, a network or a disk that hangs: without it the run would wait for ever. Its
  clock starts with the first `beat`, so that compilation takes as long as it likes.
  """

  def __init__(self, seconds: float | None):
    """For a deadline; None: no watch."""
    self._seconds = seconds
    self._last: float | None = None
    self._what = ''
    self._over = threading.Event()
    self._thread: threading.Thread | None = None

  def beat(self, what: str) -> None:
    """Notes that something has happened; `what` is named if nothing follows."""
    self._what, self._last = what, time.monotonic()

  def __enter__(self):
    if self._seconds is not None:
      self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
      self._thread.start()
    return self

  def __exit__(self, *exception):
    self._over.set()
    if self._thread is not None:
      self._thread.join()

  def _watch(self):
    while not self._over.wait(min(1.0, self._seconds / 4)):
      last = self._last
      if last is not None and time.monotonic() - last > self._seconds:
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        print(
          f'error: nothing has happened for {self._seconds:g} s (watchdog_seconds) after '
          f'{self._what}; the same command goes on from the newest checkpoint',
          file=sys.__stderr__, flush=True,
        )  # fmt: skip
        os._exit(STUCK)
