"""Checkpoints that are verified when they are read: Orbax writes them, checksums go with them.

A step's folder holds the parameters, the rest of the training state, and a record with the data's
fingerprint and the checksum of every array. A restore takes the newest step that verifies; newer
ones that did not are moved to `damaged/`, never deleted.
"""

import asyncio
import hashlib
import json
import operator
import pathlib
from collections.abc import Callable
from unittest import mock

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from rla_jax.training import distributed
from rla_jax.training.checksums import describe, named_leaves
from rla_jax.training.errors import CheckpointError
from rla_jax.training.state import TrainState

_ITEMS = ('params', 'ema', 'progress', 'record')


class Checkpoints:
  """The checkpoints of a working directory; a context manager that waits for pending saves."""

  def __init__(
    self,
    root: pathlib.Path,
    config: ConfigDict | None = None,
    say: Callable[[str], None] = print,
  ):
    """Opens `root/checkpoints`.

    Args:
      root: the working directory, absolute.
      config: says how many are kept; None: to restore only, changing nothing.
      say: takes a line about a checkpoint that is damaged.
    """
    self._root, self._say, self._read_only = root, say, config is None
    options = ocp.CheckpointManagerOptions(
      step_format_fixed_length=8,
      create=config is not None,
      read_only=config is None,
      **({} if config is None else _retention(config)),
    )
    self._manager = ocp.CheckpointManager(root / 'checkpoints', options=options, item_names=_ITEMS)

  def save(
    self, step: int, state: TrainState, fingerprint: dict, loss: float | None = None
  ) -> None:
    """Starts to save; the arrays may be donated as soon as this returns.

    Args:
      step: steps that the state has behind it.
      state: the training state.
      fingerprint: the data pipeline's; JSON-serialisable.
      loss: of an evaluation at this step, by which `keep_best` judges.

    Raises:
      CheckpointError: this or the save before it failed.
    """
    trees = state.items
    arrays = {item: describe(tree) for item, tree in trees.items()}
    record = {'step': step, 'data': fingerprint, 'arrays': arrays}
    record['sha256'] = _sha256(record)
    items = ocp.args.Composite(
      **{item: ocp.args.StandardSave(tree) for item, tree in trees.items()},
      record=ocp.args.JsonSave(record),
    )
    try:
      metrics = None if loss is None else {'loss': loss}
      saved = self._manager.save(step, args=items, force=True, metrics=metrics)
    except Exception as error:
      raise CheckpointError(
        f'the checkpoint of step {step} was not saved: {_one_line(error)}'
      ) from error
    if not saved:
      raise CheckpointError(f'the checkpoint of step {step} was not saved: Orbax declined it')

  def restore(self, **targets) -> tuple[int, dict, dict] | None:
    """Restores the newest checkpoint that verifies.

    Args:
      **targets: some of `params`, `ema` and `progress`: trees of ShapeDtypeStruct with shardings.

    Returns:
      Its step, {item: tree of arrays}, and the data's fingerprint; None if there is no checkpoint.

    Raises:
      CheckpointError: it holds other arrays than the targets, or there are checkpoints but none
        verifies.
    """
    damaged = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      damage = None
      try:
        record, trees = self._read(step, targets)
      except CheckpointError:
        raise
      except Exception as error:  # Damage takes many forms, deep inside Orbax and TensorStore.
        damage = _first_line(error)
      if not distributed.all_agree(damage is None):
        damage = damage or 'another process cannot read it'
      else:
        damage = _wrong(record, trees)
      if damage is None:
        self._set_aside(damaged)
        return step, trees, record['data']
      damaged.append(step)
      self._say(f'checkpoint {step} is damaged, trying an older one: {damage}')
    if damaged:
      raise CheckpointError(
        f'no checkpoint in {self._root}/checkpoints verifies (tried steps {damaged}); '
        'move the folder away to start anew'
      )
    return None

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, verified or not, in order."""
    return sorted(self._manager.all_steps())

  def check(self) -> None:
    """Raises what went wrong in the background since the last call.

    Raises:
      CheckpointError: a save failed.
    """
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise CheckpointError(f'a checkpoint was not saved: {_one_line(error)}') from error

  def wait(self) -> None:
    """Waits until what has been saved is on disk.

    Raises:
      CheckpointError: a save failed.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise CheckpointError(f'a checkpoint was not saved: {_one_line(error)}') from error

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    try:
      self.wait()
    except CheckpointError:
      if error is None:  # An error on its way says more than its consequences.
        raise
    finally:
      self._manager.close()

  def _read(self, step, targets):
    record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))
    record = record['record']
    sha256 = record.pop('sha256')
    if sha256 != _sha256(record) or record['step'] != step:
      raise ValueError('its record does not verify')
    for item, target in targets.items():
      _check_target(step, record['arrays'][item], target)
    items = {item: ocp.args.StandardRestore(target) for item, target in targets.items()}
    with mock.patch.object(asyncio, 'new_event_loop', _WaitingLoop):
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    return record, {item: restored[item] for item in targets}

  def _set_aside(self, steps):
    if not steps or self._read_only:
      return
    if distributed.is_first():
      for step in steps:
        (folder,) = (p for p in (self._root / 'checkpoints').iterdir() if p.name == f'{step:08d}')
        target = self._root / 'damaged' / folder.name
        target.parent.mkdir(exist_ok=True)
        number = sum(p.name.startswith(folder.name) for p in target.parent.iterdir())
        folder.rename(target.with_name(f'{folder.name}.{number}'))
    distributed.wait_for_all('damaged checkpoints are set aside')
    self._manager.reload()


class _WaitingLoop(asyncio.SelectorEventLoop):
  """An event loop that ends its tasks before it closes.

  Orbax closes its loop as soon as one array cannot be read. The reads of the others would then find
  it closed, and each would print a traceback, some of them only when they are collected.
  """

  def close(self):
    while tasks := asyncio.all_tasks(self):
      self.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    super().close()


def _retention(config: ConfigDict) -> dict:
  """Options of Orbax that say which checkpoints stay."""
  if not config.keep_best:
    return {'max_to_keep': config.keep_checkpoints, 'keep_period': config.keep_every}
  policies = ocp.checkpoint_managers
  loss = operator.itemgetter('loss')
  kept = [
    policies.LatestN(n=config.keep_checkpoints),
    policies.BestN(
      get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
    ),
  ]
  if config.keep_every is not None:
    kept.append(policies.EveryNSteps(interval_steps=config.keep_every))
  return {'preservation_policy': policies.AnyPreservationPolicy(kept), 'best_fn': loss}


def _wrong(record: dict, trees: dict) -> str | None:
  """Names an array that is not the one that was saved; None if all are."""
  for item, tree in trees.items():
    expected = record['arrays'][item]
    wrong = [path for path, found in describe(tree).items() if found != expected[path]]
    if wrong:
      return f'the checksum of {item}/{wrong[0]} does not verify ({len(wrong)} arrays)'
  return None


def _check_target(step: int, saved: dict[str, list], target) -> None:
  """Refuses other arrays than those asked for: Orbax would cast some of them silently."""
  wanted = {path: [str(x.dtype), list(x.shape)] for path, x in named_leaves(target)}
  for path in {**saved, **wanted}:
    there = saved[path][:2] if path in saved else 'absent'
    if there != wanted.get(path, 'absent'):
      raise CheckpointError(
        f'checkpoint {step} does not fit the model: {path} is {there} there, '
        f'{wanted.get(path, "absent")} in the model'
      )


def _sha256(record: dict) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _one_line(error: Exception) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())[:300]}'


def _first_line(error: Exception) -> str:
  """The beginning alone: TensorStore's messages hold its whole specification."""
  return f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:150]}'
