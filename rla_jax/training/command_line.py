"""What the programs in `experiments/` share: flags, the config flag, errors as one line."""

import difflib
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from rla_jax.data import DataError
from rla_jax.sharding import AXES
from rla_jax.training import distributed
from rla_jax.training.config import get_config, leaves
from rla_jax.training.errors import ConfigError, TrainingError

flags.disclaim_key_flags()  # --help lists --config among the flags of the program that defines it.

USAGE = 2  # Exit status of a wrong command line or config.
FAILED = 1  # Exit status of a run that ended with an error.


def define_config():
  """Defines `--config=FILE`, required, and `--config.KEY=VALUE`; returns the flag's holder."""
  holder = config_flags.DEFINE_config_file(
    'config', None, 'Config file, a Python file with get_config().', lock_config=True
  )
  flags.mark_flag_as_required('config')
  return holder


def overrides() -> str | None:
  """What the command line changes in the config file, 'KEY=VALUE ...' by name; None: nothing."""
  given = config_flags.get_override_values(flags.FLAGS['config'])
  return ' '.join(f'{key}={value}' for key, value in sorted(given.items())) or None


def run(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
  """Parses the flags, calls main and exits with the status it returns.

  Errors that a user can act on (`TrainingError`, `DataError`, those of files, of flags and of the
  config) end the program with one line on stderr; anything else keeps its traceback. One of many
  processes ends at once, whatever its peers do.
  """
  app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


def unknown_key(path: str, config: ConfigDict) -> str:
  """Says that a config has no such key, and which one was probably meant.

  Args:
    path: dotted path of the key, as in `data.seq_len`.
    config: a config with all its keys.
  """
  known = list(leaves(config))
  name = path.rpartition('.')[2]
  near = [key for key in known if key.rpartition('.')[2] == name]
  near = near or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
  if not near:
    by_name = {key.rpartition('.')[2]: key for key in known}
    near = [by_name[n] for n in difflib.get_close_matches(name, by_name, n=1, cutoff=0.6)]
  hint = f'did you mean {near[0]!r}?' if near else f'the keys are: {", ".join(known)}'
  return f'unknown config key {path!r}; {hint}'


def numbers(flag: flags.FlagHolder) -> list[int]:
  """The numbers of a list flag.

  Raises:
    ConfigError: one of them is no whole number above 0.
  """
  if wrong := [x for x in flag.value if not (x.isdecimal() and int(x))]:
    raise ConfigError(f'--{flag.name} has {wrong[0]!r}; expected whole numbers with commas')
  return [int(x) for x in flag.value]


def choices(*holders: flags.FlagHolder) -> None:
  """Checks list flags whose default is all that there is.

  Raises:
    ConfigError: one has something else.
  """
  for flag in holders:
    if unknown := sorted(set(flag.value) - set(flag.default)):
      raise ConfigError(f'--{flag.name} has {unknown[0]!r}; expected some of {flag.default}')


def sizes_of(layout: str) -> dict[str, int]:
  """Sizes of all mesh axes of a layout that a flag writes as fsdp=-1,tensor=2; others are 1.

  Raises:
    ConfigError: it is not written so.
  """
  sizes = dict.fromkeys(AXES, 1)
  try:
    given = {axis: int(size) for axis, size in (part.split('=') for part in layout.split(','))}
  except ValueError:
    given = {layout: 1}
  if not set(given) <= set(sizes):
    raise ConfigError(f'--layout is {layout!r}; expected axis=size, of {list(sizes)}, with commas')
  return sizes | given


def _parse(argv):
  file = next((a.partition('=')[2] for a in argv if re.match('--?config=', a)), '')
  file = file.partition(':')[0]
  if file and not pathlib.Path(file).is_file():
    _fail(f'config file {file!r} does not exist', USAGE)
  try:
    rest = flags.FLAGS(argv)
  except flags.Error as error:
    _fail(_explain_flag(str(error), file), USAGE)
  except Exception as error:
    _fail(_explain(error, argv, file), USAGE)
  if len(rest) > 1:
    _fail(f'unexpected argument {rest[1]!r}; flags are written --name=value', USAGE)
  return rest


def _explain_flag(message: str, file: str) -> str:
  """One line on what absl says about a flag, a config file among them."""
  missing = re.search(r'Flag --(\w+) must have a value', message)
  if missing:
    return f'--{missing[1]} is required (--help lists the flags)'
  lines = [' '.join(line.split()) for line in message.splitlines() if line.strip()]
  place = re.findall(rf'File "[^"]*{re.escape(file)}", line (\d+)', message) if file else []
  if place:
    return f'{file}:{place[-1]}: {lines[-1]}'
  return f'{" ".join(lines)} (--help lists the flags)'


def _explain(error: Exception, argv: Sequence[str], file: str) -> str:
  """One line on what went wrong while the config file was read or overridden."""
  frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(file)]
  missing = re.search(r'Key "(\w+)" does not exist', str(error))
  if file and frames:
    where = f'{file}:{frames[-1].lineno}: '
    if missing:
      return where + unknown_key(missing[1], get_config())
    return f'{where}{type(error).__name__}: {" ".join(str(error).split())}'
  if isinstance(error, (AttributeError, KeyError)):
    config = runpy.run_path(file)['get_config']()
    known = list(leaves(config))
    for path in (m[1] for a in argv if (m := re.match(r'--?(?:no)?config\.([\w.]+)', a))):
      if path not in known:
        return unknown_key(path, config)
  return ' '.join(str(error).split())


def _guarded(main, argv) -> int:
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)
    # Orbax narrates every checkpoint, and warns that to read only is to read only.
    logging.get_absl_logger().setLevel('ERROR')
  try:
    return main(argv) or 0
  except (TrainingError, DataError, OSError) as error:
    _fail(str(error), FAILED)
  except jax.errors.JaxRuntimeError as error:
    if not distributed.is_active():
      raise
    lines = str(error).splitlines()
    _fail(
      f'process {jax.process_index()} cannot go on, another one has probably ended: '
      f'{lines[0][:300]}; the same command goes on from the newest checkpoint',
      FAILED,
    )
  except KeyboardInterrupt:
    _fail('interrupted', 130)
  except Exception:
    if not distributed.is_active():
      raise
    traceback.print_exc()
    distributed.leave(FAILED)


def _fail(message: str, status: int) -> NoReturn:
  print(f'error: {message}', file=sys.stderr)
  if distributed.is_active():
    distributed.leave(status)
  sys.exit(status)
