"""When, how, at which commit, with which versions and on what a result was measured."""

import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys

import jax

import rla_jax

_PACKAGES = ('jax', 'jaxlib', 'flax')


def provenance() -> dict[str, str | dict[str, str]]:
  """What a reader needs to know to repeat a measurement of this process."""
  device = jax.devices()[0]
  cores = f', {os.cpu_count()} cores' if device.platform == 'cpu' else ''
  return {
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'command': shlex.join(['python', *sys.argv]),
    'commit': commit() or 'unknown',
    'device': device.device_kind + cores,
    'versions': {
      'rla_jax': rla_jax.__version__,
      'python': platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
  }


def today() -> str:
  """The date in UTC, as 2026-01-31."""
  return datetime.datetime.now(datetime.UTC).date().isoformat()


@functools.cache
def commit() -> str | None:
  """Commit of the checkout that this file belongs to, with `-dirty` if it was changed since.

  As it was at the first call, so that results written into the checkout do not count. None: the
  package is installed without its history. The environment variable RLA_JAX_COMMIT comes first, for
  files that were copied without theirs.
  """
  if told := os.environ.get('RLA_JAX_COMMIT'):
    return told

  def git(*words):
    command = ['git', '-C', str(pathlib.Path(__file__).parent), *words]
    try:
      done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  # An environment inside somebody else's checkout is not what that commit tells of.
  mine = git('ls-files', '--error-unmatch', pathlib.Path(__file__).name)
  return git('describe', '--always', '--dirty', '--exclude=*') if mine else None
