"""Trains a language model and evaluates it as it goes."""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rla_jax import data, sharding
from rla_jax.models import LanguageModel
from rla_jax.training import distributed, feed
from rla_jax.training import workdir as workdirs
from rla_jax.training.checkpoints import Checkpoints
from rla_jax.training.config import check, leaves, model_config, settled
from rla_jax.training.errors import ConfigError
from rla_jax.training.evaluate import Evaluation, evaluate, loss_sums
from rla_jax.training.metrics import MetricsWriter, NoMetrics
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.profile import Profile
from rla_jax.training.progress import Progress, duration
from rla_jax.training.report import Report, describe, first_start, is_due, mfu_seconds
from rla_jax.training.signals import StopRequest
from rla_jax.training.state import TrainState, abstract_state, create_state
from rla_jax.training.statistics import gate_statistics
from rla_jax.training.step import train_step
from rla_jax.training.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a run ended.

  Attributes:
    step: steps done.
    stopped_by: name of the signal that ended it early, or None.
    evaluation: that of the last step; None if the run was ended early.
    state: the state after the last step.
  """

  step: int
  stopped_by: str | None
  evaluation: Evaluation | None
  state: TrainState


def train_and_evaluate(config: ConfigDict, workdir: str | os.PathLike) -> Outcome:
  """Trains as the config says; goes on from the newest checkpoint in workdir, bit by bit the same.

  SIGTERM and Ctrl-C save a checkpoint and return.

  Args:
    config: from `get_config()` and overrides.
    workdir: where checkpoints and metrics go; nothing is written elsewhere.

  Raises:
    ConfigError: keys that exclude each other, or do not fit the devices or the data.
    WorkdirError: workdir belongs to another config, or is in use.
    CheckpointError: no checkpoint can be restored or one cannot be saved.
    DivergedError: loss or gradients were not finite too often.
    DataError: the text or the tokenizer cannot be used.
  """
  data_config = check(config)
  if config.compile_cache is not None:
    jax.config.update('jax_compilation_cache_dir', config.compile_cache)
  mesh = make_mesh(config)
  parts = settled(config, mesh).accumulate
  share = feed.share(mesh)
  with workdirs.claimed(workdir, config) as root, StopRequest() as stop, jax.set_mesh(mesh):
    corpus = data.load(data_config)
    fingerprint = data.fingerprint(data_config, corpus)
    distributed.expect_equal('the config or the text', [shared_keys(config), fingerprint])
    model = LanguageModel(model_config(config, corpus.tokenizer.vocab_size))
    optimizer = make_optimizer(config)
    abstract = _config_errors(abstract_state, model, optimizer, mesh, config)
    workdirs.write_config(root, config)

    silent = not distributed.is_first()
    with (
      Progress(config.steps, silent) as progress,
      Watchdog(config.watchdog_seconds) as watchdog,
      Checkpoints(root, config, progress.say) as checkpoints,
    ):
      state = restore(checkpoints, abstract, fingerprint)
      if state is None:
        state = create_state(model, optimizer, abstract, config.seed, config)
      start = int(state.step)
      workdirs.record_start(root, start)
      progress.say(describe(root, config, model, corpus, abstract, mesh, start))

      loss = functools.partial(loss_sums, model)
      evaluation_step = jax.jit(loss)
      statistics_step = jax.jit(functools.partial(gate_statistics, model))
      held_out = data.evaluation_batches(
        data_config, corpus, batch_size=data_config.batch_size // parts,
        max_tokens=config.eval_tokens, **share,
      )  # fmt: skip
      batches = feed.ahead(
        data.train_batches(data_config, corpus, start_step=start, **share), mesh
      )
      batch = next(batches)
      if start < config.steps:  # All that is left of a finished run is its evaluation.
        step = compile_step(
          functools.partial(
            train_step, loss_sums=loss, optimizer=optimizer, config=settled(config, mesh)
          ),
          abstract, batch, progress,
        )  # fmt: skip

      profile = Profile(root / 'profile', config.profile.start, config.profile.steps)
      writer = NoMetrics() if silent else MetricsWriter(root, start, config.wandb)
      with writer as metrics, profile:
        report = Report(
          config, metrics, progress, mfu_seconds(config, model),
          None if silent else first_start(root),
        )
        number = start
        while True:
          evaluation = None
          stop.asked()
          # What is due between steps; after a restart, also what its predecessor did not get to.
          if is_due(number, config.eval_every, config.steps) and number > 0 and not stop:
            report.wait()
            watchdog.beat(f'step {number}')
            evaluation = evaluate(
              evaluation_step, state.evaluated, held_out, mesh, stop.asked, watchdog.beat
            )
            report.evaluated(number, evaluation)
          if number > start and (is_due(number, config.checkpoint_every, config.steps) or stop):
            report.wait()
            metrics.flush()
            watchdog.beat(f'step {number}')
            checkpoints.save(number, state, fingerprint, evaluation and evaluation.loss)
            watchdog.beat(f'the checkpoint of step {number}')
            progress.pause()
          if number == config.steps or stop:
            break
          profile.before(number + 1, state)
          state, result = step(state, batch)
          number += 1
          if is_due(number, config.statistics_every, config.steps):
            result |= statistics_step(state.params, batch)
          batch = next(batches)
          report.step(number, result)
          watchdog.beat(f'step {number}')
          checkpoints.check()
        checkpoints.wait()
      if stop:
        progress.say(f'{stop.name} at step {number}: stopped; the same command goes on from there')
        return Outcome(number, stop.name, None, state)
      return Outcome(number, None, evaluation, state)


def shared_keys(config: ConfigDict) -> dict[str, object]:
  """The config by key, without what may differ from host to host."""
  return {path: value for path, value in leaves(config).items() if path != 'data.cache_dir'}


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh that the config asks for.

  Args:
    config: the whole config.
    devices: attached or described; None: all that are attached.

  Raises:
    ConfigError: it does not fill the devices, or the rows of a batch do not divide over it.
  """
  mesh = _config_errors(sharding.make_mesh, **config.mesh, devices=devices)
  if config.data.seq_len % mesh.shape['seq']:
    raise ConfigError(
      f'mesh.seq is {mesh.shape["seq"]}, which does not divide data.seq_len, {config.data.seq_len}'
    )
  places = mesh.shape['data'] * mesh.shape['fsdp']
  rows, parts = config.data.batch_size, config.accumulate or 1
  if rows % (places * parts):
    raise ConfigError(
      f'data.batch_size is {rows}, which does not divide over {places} devices (mesh.data * '
      f'mesh.fsdp) times accumulate = {parts}; {_nearest(rows, places, parts)}'
    )
  return mesh


def _nearest(rows: int, places: int, parts: int) -> str:
  """What is nearest to a layout that does not divide the rows of a batch, and does."""
  if rows % places == 0:
    fewer = max(p for p in range(1, parts) if rows // places % p == 0)
    return f'accumulate = {fewer} would do'
  common = math.gcd(rows, places)
  return (
    f'mesh.data * mesh.fsdp = {common} would do, with the other {places // common} along '
    f'mesh.tensor or mesh.seq, or {-(-rows // places) * places} rows with accumulate = 1'
  )


def restore(checkpoints: Checkpoints, abstract: TrainState, fingerprint: dict) -> TrainState | None:
  """The state of the newest checkpoint that verifies; None if there is none.

  Raises:
    CheckpointError: see `Checkpoints.restore`.
    DataError: it was trained on other data, or in another order.
  """
  found = checkpoints.restore(**abstract.items)
  if found is None:
    return None
  _, trees, saved_fingerprint = found
  data.check_fingerprint(saved_fingerprint, fingerprint)
  return TrainState(**trees.pop('progress'), **trees)


def compile_step(step, abstract: TrainState, batch: dict, progress: Progress):
  """Compiles the step ahead of time, so that it cannot be compiled a second time.

  The state's buffers are donated: the old state is gone after a call.
  """
  progress.say('compiling the training step ...')
  begin = time.perf_counter()
  placed = jax.tree.map(lambda x: x.sharding, abstract)
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
  compiled = jitted.lower(abstract, batch).compile()
  progress.say(f'compiled in {duration(time.perf_counter() - begin)}')
  return compiled


def _config_errors(function, *args, **kwargs):
  try:
    return function(*args, **kwargs)
  except ValueError as error:
    raise ConfigError(str(error)) from error

