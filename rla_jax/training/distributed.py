"""Many processes, one program: joining them, and what they have to agree on.

JAX starts and watches the processes (`jax.distributed`); it finds its peers by itself under SLURM,
Open MPI, on TPU pods and in GKE. A process that dies is noticed by its missing heartbeats, one that
is stuck by the watchdog of those that wait for it.
"""

import hashlib
import json
import os
import sys
from typing import NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from rla_jax.training.errors import ConfigError

_HEARTBEAT_SECONDS = 60  # A process without heartbeats for so long is dead, and so is the run.


def define_flags(holder: flags.FlagValues | None = None) -> None:
  """Defines the flags that `initialize` reads; holder None: in absl's."""
  where = {'flag_values': flags.FLAGS if holder is None else holder}
  flags.DEFINE_bool(
    'distributed', False, 'One of many processes, which JAX finds: SLURM, Open MPI, TPU pod, GKE.',
    **where,
  )  # fmt: skip
  flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, where JAX cannot find it.', **where
  )
  flags.DEFINE_integer(
    'num_processes', None, 'How many processes there are, with --coordinator.', **where
  )
  flags.DEFINE_integer('process_id', None, 'Which of them this one is, likewise.', **where)


def initialize() -> None:
  """Joins the other processes, if the flags say that there are any. Comes before any use of JAX.

  Raises:
    ConfigError: flags that do not go together, processes that cannot be found, or a launcher that
      has started several although no flag says so.
  """
  f = flags.FLAGS
  explicit = {name: f[name].value for name in ('coordinator', 'num_processes', 'process_id')}
  missing = [name for name, value in explicit.items() if value is None]
  if missing and len(missing) < len(explicit):
    raise ConfigError(f'--{missing[0]} is missing; expected --{", --".join(explicit)} together')
  if missing and not f.distributed:
    _expect_one_process()
    return
  try:
    jax.distributed.initialize(
      coordinator_address=f.coordinator,
      num_processes=f.num_processes,
      process_id=f.process_id,
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    message = ' '.join(str(error).split())[:300]
    raise ConfigError(f'the processes of this run did not find each other: {message}') from error


def is_active() -> bool:
  """Whether this is one of several processes."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
  """Whether this is process 0, the one that writes what is written once."""
  return jax.process_index() == 0


def expect_equal(what: str, value) -> None:
  """Compares a JSON-serialisable value over all processes.

  Raises:
    ConfigError: they differ.
  """
  if not is_active():
    return
  text = json.dumps(value, sort_keys=True, default=str)
  digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.uint32)
  everyone = np.asarray(multihost_utils.process_allgather(digest)).reshape(-1)
  other = np.flatnonzero(everyone != everyone[0])
  if other.size:
    raise ConfigError(
      f'{what} of process {other[0]} is not that of process 0: '
      'start all processes with the same command and the same files'
    )


def all_agree(good: bool) -> bool:
  """Whether it is true on every process."""
  if not is_active():
    return good
  return bool(np.all(multihost_utils.process_allgather(np.asarray(good))))


def wait_for_all(name: str) -> None:
  """Returns when every process has come here."""
  if is_active():
    multihost_utils.sync_global_devices(name)


def leave(status: int) -> NoReturn:
  """Ends this process at once: the usual end would wait for peers that may be stuck."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _expect_one_process() -> None:
  for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'):
    if int(os.environ.get(name, '1')) > 1:
      raise ConfigError(
        f'{name} is {os.environ[name]}, so this is one of several processes; pass --distributed'
      )
