"""Whether a run that is killed again and again ends, bit for bit, where an undisturbed one does.

Each of the two runs keeps the programs that it compiles for itself: the undisturbed one is compiled
anew, so a compiler that does not choose the same way twice is noticed as well.
"""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
from collections.abc import Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from rla_jax import data, sharding
from rla_jax.models import LanguageModel
from rla_jax.training.checkpoints import Checkpoints
from rla_jax.training.checksums import named_leaves
from rla_jax.training.config import check, model_config
from rla_jax.training.errors import ConfigError, TrainingError
from rla_jax.training.metrics import read
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.state import abstract_state
from rla_jax.training.workdir import read_config

# Metrics that depend on the clock.
_TIMED = frozenset({
  'train/tokens_per_second', 'train/mfu', 'train/productive_seconds', 'train/goodput'
})  # fmt: skip


def check_kills(config: ConfigDict, kills: int) -> None:
  """Every kill needs two checkpoint intervals before it, so that there is one to resume from.

  Raises:
    ConfigError: the run is too short for so many.
  """
  needed = 3 * config.checkpoint_every * kills
  if not 0 < needed < config.steps:
    raise ConfigError(
      f'steps is {config.steps}, expected more than 3 * checkpoint_every * kills = {needed} > 0'
    )


def train(command: Sequence[str], workdir: pathlib.Path) -> None:
  """Runs a training program to its end.

  Args:
    command: of the program, without its working directory.
    workdir: the working directory.

  Raises:
    TrainingError: it fails.
  """
  _run(command, workdir, None)


def train_and_kill(
  command: Sequence[str], workdir: pathlib.Path, every: int, rng: random.Random
) -> int:
  """Starts or continues a run, and kills it (-9) at a random step; returns that step.

  Args:
    command: as for `train`.
    workdir: the working directory.
    every: steps between checkpoints, of which two intervals pass before the kill.
    rng: draws the step.

  Raises:
    TrainingError: the run ends before.
  """
  begun = len(starts(workdir))
  return _run(command, workdir, (begun, rng.randrange(2 * every + 1, 3 * every + 1)))


def starts(workdir: pathlib.Path) -> list[int]:
  """Steps that the starts of a run went on from; none without a run."""
  path = workdir / 'starts.jsonl'
  return [json.loads(x)['step'] for x in path.read_text().splitlines()] if path.exists() else []


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
  """What differs between two finished runs: arrays of their last checkpoints, metrics by step.

  Arrays are compared word by word, so that zeros of different signs differ and equal NaNs do not.

  Args:
    one, other: working directories of runs with the same config, but for their folders.

  Raises:
    TrainingError: a run has no checkpoint of its last step.
  """
  first, second = map(_arrays, (one, other))
  found = [
    f'{path}: {np.count_nonzero(_words(x) != _words(second[path])):,} of {x.size:,} numbers'
    for path, x in first.items()
    if not np.array_equal(_words(x), _words(second[path]))
  ]
  first, second = map(_records, (one, other))
  if [a['step'] for a in first] != [b['step'] for b in second]:
    return [*found, f'records of {len(first)} and {len(second)} steps, or not of the same']
  for a, b in zip(first, second, strict=True):
    found += [f'step {a["step"]}: {name} {a.get(name)!r} and {b.get(name)!r}'
              for name in sorted({*a, *b}) if a.get(name) != b.get(name)]  # fmt: skip
  return found


def _run(command, workdir, kill):
  """Runs a program; kill: (starts before it, steps after which it is killed)."""
  options = [f'--workdir={workdir}', f'--config.compile_cache={workdir}_compiled']
  process = subprocess.Popen(
    [*command, *options, '--config.log_every=1'], text=True,
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
  )  # fmt: skip
  last, lines = None, []
  with process:
    for line in process.stderr:
      lines.append(line.rstrip())
      reached = re.match(r'step (\d+)/', line)
      if kill and reached:
        last = last or starts(workdir)[kill[0]] + kill[1]
        if int(reached[1]) >= last:
          os.kill(process.pid, signal.SIGKILL)
          process.wait()
          return int(reached[1])
  if kill or process.returncode:
    raise TrainingError('\n'.join([f'the run in {workdir} ended too early:', *lines[-20:]]))
  return None


def _arrays(workdir):
  """All arrays of the last checkpoint by name."""
  config = read_config(workdir)
  vocab_size = data.tokenizer_of(check(config)).vocab_size
  model, mesh = LanguageModel(model_config(config, vocab_size)), sharding.make_mesh()
  abstract = abstract_state(model, make_optimizer(config), mesh, config)
  with Checkpoints(workdir) as checkpoints:
    step, trees, _ = checkpoints.restore(**abstract.items) or (None, None, None)
  if step != config.steps:
    raise TrainingError(
      f'the last checkpoint in {workdir} is of step {step}, expected {config.steps}'
    )
  return {path: np.asarray(x) for path, x in named_leaves(jax.device_get(trees))}


def _words(x: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(x).reshape(-1).view(f'u{x.dtype.itemsize}')


def _records(workdir):
  records = read(workdir / 'metrics.jsonl')
  return [{k: v for k, v in record.items() if k not in _TIMED} for record in records]
