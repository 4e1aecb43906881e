"""Ensembles made ahead of time: one is compiled in a thread of its own while another trains."""

import concurrent.futures
import threading
from collections.abc import Callable, Hashable


class Ahead:
  """Results of `make`, by their keys, that may be asked for before they are needed."""

  def __init__(self, make: Callable):
    """`make` takes the arguments behind the key."""
    self._make = make
    self._begun: dict[Hashable, concurrent.futures.Future] = {}

  def begin(self, key: Hashable, *arguments) -> None:
    """Starts to make it, once. A process that ends waits only for pools that `make` has at work."""
    if key in self._begun:
      return
    future = self._begun[key] = concurrent.futures.Future()

    def work():
      try:
        future.set_result(self._make(*arguments))
      except BaseException as error:  # raised again where the result is asked for
        future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()

  def take(self, key: Hashable, *arguments):
    """Waits for it, made now if it was not begun, and forgets it; raises what `make` raised."""
    self.begin(key, *arguments)
    return self._begun.pop(key).result()
