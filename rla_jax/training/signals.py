"""SIGTERM and Ctrl-C as a request to save and leave, at the same step on every process."""

import signal
import threading

from jax.experimental import multihost_utils

from rla_jax.training import distributed


class StopRequest:
  """Context in which SIGTERM and SIGINT set `name`; a second SIGINT interrupts at once.

  With many processes, JAX takes SIGTERM: whichever process gets it, all learn of it, and agree on
  a call of `asked` that none of them has come to.
  """

  def __init__(self):
    """Nothing has been asked for yet."""
    self.name: str | None = None
    self._previous = {}
    self._shared, self._calls = False, 0

  def asked(self) -> bool:
    """Whether to stop here; every process has to call it at the same places."""
    if self._shared and not self:
      self._calls += 1
      if multihost_utils.reached_preemption_sync_point(self._calls):
        self.name = 'SIGTERM'
    return bool(self)

  def __enter__(self):
    self._shared = distributed.is_active()
    if threading.current_thread() is threading.main_thread() and not self._shared:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *exception):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __bool__(self):
    return self.name is not None

  def _receive(self, number, frame):
    if number == signal.SIGINT and self.name:
      raise KeyboardInterrupt
    self.name = signal.Signals(number).name
