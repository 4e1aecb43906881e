"""Trains a language model and evaluates it as it goes."""

import dataclasses
import functools
import os
import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rla_jax import data, sharding
from rla_jax.models import LanguageModel
from rla_jax.training import workdir as workdirs
from rla_jax.training.checkpoints import Checkpoints
from rla_jax.training.config import check, model_config
from rla_jax.training.errors import ConfigError, DivergedError
from rla_jax.training.evaluate import Evaluation, evaluate, loss_sums, to_devices
from rla_jax.training.metrics import MetricsWriter
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.progress import Progress, duration
from rla_jax.training.signals import StopRequest
from rla_jax.training.state import TrainState, abstract_state, create_state
from rla_jax.training.step import train_step


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
  mesh = make_mesh(config)
  with workdirs.claimed(workdir, config) as root, StopRequest() as stop, jax.set_mesh(mesh):
    corpus = data.load(data_config)
    fingerprint = data.fingerprint(data_config, corpus)
    model = LanguageModel(model_config(config, corpus.tokenizer.vocab_size))
    optimizer = make_optimizer(config)
    abstract = _config_errors(abstract_state, model, optimizer, mesh)
    workdirs.write_config(root, config)

    with Progress(config.steps) as progress, Checkpoints(root, config, progress.say) as checkpoints:
      state = restore(checkpoints, abstract, fingerprint)
      if state is None:
        state = create_state(model, optimizer, abstract, config.seed)
      start = int(state.step)
      workdirs.record_start(root, start)
      progress.say(describe(root, config, model, corpus, abstract, mesh, start))

      loss = functools.partial(loss_sums, model)
      evaluation_step = jax.jit(loss)
      held_out = data.evaluation_batches(
        data_config, corpus, batch_size=data_config.batch_size // config.accumulate,
        max_tokens=config.eval_tokens, **_process(),
      )  # fmt: skip
      batches = data.train_batches(data_config, corpus, start_step=start, **_process())
      batch = to_devices(next(batches), mesh)
      step = compile_step(
        functools.partial(train_step, loss_sums=loss, optimizer=optimizer, config=config),
        abstract, batch, progress,
      )  # fmt: skip

      with MetricsWriter(root, start) as metrics:
        report = Report(config, metrics, progress)
        number, evaluation = start, None
        while True:
          # What is due between steps; after a restart, also what its predecessor did not get to.
          if is_due(number, config.eval_every, config.steps) and number > 0 and not stop:
            report.wait()
            evaluation = evaluate(evaluation_step, state.params, held_out, mesh, lambda: bool(stop))
            report.evaluated(number, evaluation)
          if number > start and (is_due(number, config.checkpoint_every, config.steps) or stop):
            report.wait()
            metrics.flush()
            checkpoints.save(number, state, fingerprint)
            progress.pause()
          if number == config.steps or stop:
            break
          state, result = step(state, batch)
          number += 1
          batch = to_devices(next(batches), mesh)
          report.step(number, result)
          checkpoints.check()
        checkpoints.wait()
      if stop:
        progress.say(f'{stop.name} at step {number}: stopped; the same command goes on from there')
        return Outcome(number, stop.name, None, state)
      return Outcome(number, None, evaluation, state)


def make_mesh(config: ConfigDict) -> Mesh:
  """The mesh that the config asks for.

  Raises:
    ConfigError: it does not fill the devices, or the rows of a batch do not divide over it.
  """
  mesh = _config_errors(sharding.make_mesh, **config.mesh)
  if mesh.shape['seq'] > 1:
    raise ConfigError(f'mesh.seq is {mesh.shape["seq"]}, expected 1: layers do not split sequences')
  places = mesh.shape['data'] * mesh.shape['fsdp']
  size, unit = config.data.batch_size, places * config.accumulate
  if size % unit:
    below = size // unit * unit
    near = f'{below} or {below + unit}' if below else f'{unit}'
    raise ConfigError(
      f'data.batch_size is {size}, which does not divide over {places} devices (mesh.data * '
      f'mesh.fsdp) times accumulate = {config.accumulate}; the nearest that does: {near}'
    )
  return mesh


def restore(checkpoints: Checkpoints, abstract: TrainState, fingerprint: dict) -> TrainState | None:
  """The state of the newest checkpoint that verifies; None if there is none.

  Raises:
    CheckpointError: see `Checkpoints.restore`.
    DataError: it was trained on other data, or in another order.
  """
  found = checkpoints.restore(params=abstract.params, progress=abstract.progress)
  if found is None:
    return None
  _, trees, saved_fingerprint = found
  data.check_fingerprint(saved_fingerprint, fingerprint)
  return TrainState(params=trees['params'], **trees['progress'])


def compile_step(step, abstract: TrainState, batch: dict, progress: Progress):
  """Compiles the step ahead of time, so that it cannot be compiled a second time.

  The state's buffers are donated: the old state is gone after a call.
  """
  begin = time.perf_counter()
  placed = jax.tree.map(lambda x: x.sharding, abstract)
  jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
  compiled = jitted.lower(abstract, batch).compile()
  progress.say(f'compiled the training step in {duration(time.perf_counter() - begin)}')
  return compiled


def is_due(step: int, every: int, last: int) -> bool:
  """Whether something that happens every so many steps, and at the last, happens after a step."""
  return step % every == 0 or step == last


class Report:
  """Metrics and log lines, one step behind the device, so that it never waits for them."""

  def __init__(self, config: ConfigDict, metrics: MetricsWriter, progress: Progress):
    """Nothing is pending."""
    self._config, self._metrics, self._progress = config, metrics, progress
    self._pending: tuple[int, dict] | None = None

  def step(self, number: int, result: dict[str, jax.Array]) -> None:
    """Takes the results of the step just dispatched; reports those of the one before.

    Raises:
      DivergedError: too many steps in a row were not finite.
    """
    previous, self._pending = self._pending, (number, result)
    if previous is not None:
      self._report(*previous)

  def wait(self) -> None:
    """Waits for the step last dispatched and reports it.

    Raises:
      DivergedError: as `step`.
    """
    previous, self._pending = self._pending, None
    if previous is not None:
      self._report(*previous)

  def evaluated(self, number: int, evaluation: Evaluation | None) -> None:
    """Reports an evaluation, unless it was broken off."""
    self._progress.pause()
    if evaluation is None:
      return
    self._progress.say(f'step {number}  evaluation: {evaluation}')
    self._metrics.write(number, {
      'eval/loss': evaluation.loss,
      'eval/perplexity': evaluation.perplexity,
      'eval/bits_per_byte': evaluation.bits_per_byte,
    })  # fmt: skip

  def _report(self, number, result):
    result = {name: float(value) for name, value in jax.device_get(result).items()}
    self._progress.count(number, int(result['tokens']))
    bad = int(result['bad_steps'])
    if bad:
      self._progress.say(
        f'step {number}  skipped: loss {result["loss"]}, gradient norm {result["grad_norm"]} '
        f'({bad} in a row, max_bad_steps {self._config.max_bad_steps})'
      )
    if bad > self._config.max_bad_steps:
      raise DivergedError(
        f'loss or gradients were not finite for {bad} steps in a row, up to step {number}; '
        'checkpoints from before are as they were'
      )
    if not is_due(number, self._config.log_every, self._config.steps):
      return
    line = (
      f'step {number}/{self._config.steps}  loss {result["loss"]:.4f}  '
      f'lr {result["learning_rate"]:.2e}  |grad| {result["grad_norm"]:.3f}'
    )
    timed = self._progress.rate()
    if timed is not None:
      speed, left = timed
      line += f'  {speed:,.0f} tokens/s  ETA {duration(left)}'
      self._metrics.write(number, {'train/tokens_per_second': speed})
    self._progress.say(line)
    self._metrics.write(number, {
      'train/loss': result['loss'],
      'train/learning_rate': result['learning_rate'],
      'train/grad_norm': result['grad_norm'],
      'train/bad_steps': bad,
    })  # fmt: skip


def describe(root, config, model, corpus, abstract, mesh, start) -> str:
  """What is about to be trained, on what and where: the lines at the start of a run."""
  parameters = sum(x.size for x in jax.tree.leaves(abstract.params))
  tokens = config.data.batch_size * config.data.seq_len
  axes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
  placed = jax.tree.map(lambda x: x.sharding, abstract.params)
  return '\n'.join([
    sharding.table(abstract.params, placed),
    f'model    {parameters:,} parameters, {" ".join(model.config.pattern)} x '
    f'{model.config.num_layers // len(model.config.pattern)}',
    f'data     {corpus.train.num_tokens:,} tokens to train on, '
    f'{corpus.validation.num_tokens:,} held out, {corpus.tokenizer.name} tokenizer',
    f'devices  {jax.device_count()} {jax.devices()[0].device_kind}: {axes}',
    f'steps    {start} to {config.steps}, {tokens:,} tokens each',
    f'workdir  {root}',
  ])  # fmt: skip


def _config_errors(function, *args, **kwargs):
  try:
    return function(*args, **kwargs)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def _process() -> dict[str, int]:
  return {'process_index': jax.process_index(), 'process_count': jax.process_count()}
