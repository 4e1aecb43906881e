"""The working directory: one run, one config, one process at a time.

    config.json        the config, {dotted key: value}
    starts.jsonl       one line a start: date, command, versions, devices
    checkpoints/       Orbax checkpoints by step; damaged/ holds those that failed verification
    metrics.jsonl      one record a logged step; metrics.csv and tensorboard/ are made from it
"""

import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from ml_collections import ConfigDict

import rla_jax
from rla_jax.training.config import FREE_KEYS, get_config, leaves
from rla_jax.training.errors import WorkdirError

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


@contextmanager
def claimed(workdir: str | os.PathLike, config: ConfigDict) -> Iterator[pathlib.Path]:
  """Creates a working directory, or takes up that of the same config, and keeps others out.

  Keys in `FREE_KEYS` may differ from those of the earlier start. Nothing but an empty folder and a
  lock file is written.

  Args:
    workdir: the directory.
    config: the config of the run.

  Yields:
    The directory's absolute path.

  Raises:
    WorkdirError: it belongs to another config (the message lists what differs), another process
      uses it, it holds results but no config, or it cannot be written.
  """
  root = pathlib.Path(workdir).expanduser().absolute()
  try:
    root.mkdir(parents=True, exist_ok=True)
    lock = (root / '.lock').open('a')
  except OSError as error:
    raise WorkdirError(f'cannot write to workdir {root}: {error.strerror}') from error
  with lock:
    if jax.process_index() == 0:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise WorkdirError(f'another process is training in workdir {root}') from None
    _check_owner(root, config)
    yield root


def write_config(root: pathlib.Path, config: ConfigDict) -> None:
  """Writes config.json, once all that can be wrong with the config has been checked."""
  if jax.process_index() != 0:
    return
  text = json.dumps(leaves(config), indent=1) + '\n'
  partial = root / 'config.json.partial'
  partial.write_text(text)
  partial.replace(root / 'config.json')


def read_config(workdir: str | os.PathLike) -> ConfigDict:
  """The config of an earlier run; keys that it did not know have their defaults.

  Raises:
    WorkdirError: there is none, or it has keys that this version does not know.
  """
  root = pathlib.Path(workdir).expanduser().absolute()
  config, known = get_config(), leaves(get_config())
  for path, value in _saved(root).items():
    free = path.startswith('model.layer_options.')  # Its keys are layers' names.
    if path not in known and not free:
      raise WorkdirError(f'{root}/config.json has the key {path!r}, unknown to this version')
    *sections, key = path.split('.')
    place = config
    for section in sections:
      if free and section not in place:
        place[section] = ConfigDict()
      place = place[section]
    place[key] = tuple(value) if isinstance(value, list) else value
  return config


def record_start(root: pathlib.Path, step: int) -> None:
  """Appends to starts.jsonl what a reader needs to know to repeat the run."""
  if jax.process_index() != 0:
    return
  record = {
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'step': step,
    'command': sys.argv,
    'python': sys.version.split()[0],
    'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
    'rla_jax': rla_jax.__version__,
    'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
    'processes': jax.process_count(),
  }
  with (root / 'starts.jsonl').open('a') as file:
    file.write(json.dumps(record) + '\n')


def _check_owner(root: pathlib.Path, config: ConfigDict) -> None:
  if not (root / 'config.json').exists():
    results = [name for name in ('checkpoints', 'metrics.jsonl') if (root / name).exists()]
    if results:
      raise WorkdirError(f'workdir {root} holds {results[0]} but no config.json; choose another')
    return
  # Keys that an earlier version did not know had their defaults.
  defaults = json.loads(json.dumps(leaves(get_config())))
  saved, current = defaults | _saved(root), json.loads(json.dumps(leaves(config)))
  differences = [
    f'  {path}: {_shown(saved, path)} there, {_shown(current, path)} now'
    for path in {**saved, **current}
    if path not in FREE_KEYS and _shown(saved, path) != _shown(current, path)
  ]
  if differences:
    raise WorkdirError(
      '\n'.join([f'workdir {root} belongs to another config; choose another:', *differences])
    )


def _saved(root: pathlib.Path) -> dict[str, object]:
  try:
    return json.loads((root / 'config.json').read_text())
  except FileNotFoundError:
    raise WorkdirError(f'{root} is no workdir of a training run: it has no config.json') from None
  except ValueError as error:
    raise WorkdirError(f'{root}/config.json cannot be read: {error}') from error


def _shown(values: dict[str, object], path: str) -> str:
  return repr(values[path]) if path in values else 'absent'
