"""SIGTERM and Ctrl-C as a request to save and leave."""

import signal
import threading


class StopRequest:
  """Context in which SIGTERM and SIGINT set `name`; a second SIGINT interrupts at once."""

  def __init__(self):
    """Nothing has been asked for yet."""
    self.name: str | None = None
    self._previous = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
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
