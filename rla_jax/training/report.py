"""What a run tells: metrics and log lines one step behind the device, and what it starts with."""

import json
import pathlib
import time
from datetime import datetime

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rla_jax import sharding
from rla_jax.models import LanguageModel
from rla_jax.training.errors import DivergedError
from rla_jax.training.evaluate import Evaluation
from rla_jax.training.metrics import FAMILIES, PRODUCTIVE, MetricsWriter, NoMetrics
from rla_jax.training.progress import Progress, duration
from rla_jax.training.state import TrainState
from rla_jax.training.utilisation import peak_of, training_flops


def is_due(step: int, every: int | None, last: int) -> bool:
  """Whether something that happens every so many steps, and at the last, happens after a step."""
  return every is not None and (step % every == 0 or step == last)


class Report:
  """Metrics and log lines, one step behind the device, so that it never waits for them."""

  def __init__(
    self,
    config: ConfigDict,
    metrics: MetricsWriter | NoMetrics,
    progress: Progress,
    mfu_seconds: float | None = None,
    started: float | None = None,
  ):
    """Nothing is pending.

    Args:
      config: the whole config.
      metrics: takes the numbers.
      progress: takes the lines.
      mfu_seconds: see `mfu_seconds`; None: MFU is not reported.
      started: when the run was first started, in seconds since 1970; None: goodput is not reported.
    """
    self._config, self._metrics, self._progress = config, metrics, progress
    self._pending: tuple[int, dict] | None = None
    self._mfu_seconds, self._started = mfu_seconds, started
    self._productive = metrics.productive_seconds

  def step(self, number: int, result: dict[str, jax.Array]) -> None:
    """Takes the results of the step just dispatched; reports those of the one before.

    Raises:
      DivergedError: too many steps in a row were skipped.
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
      spike = self._config.max_spike
      what = 'not finite' if spike is None else f'not finite or {spike:g} times the usual ones'
      raise DivergedError(
        f'loss or gradients were {what} for {bad} steps in a row, up to step {number}; '
        'checkpoints from before are as they were'
      )
    if is_due(number, self._config.statistics_every, self._config.steps):
      found = {name: value for name, value in result.items() if name.startswith(FAMILIES)}
      self._metrics.write(number, found)
    if not is_due(number, self._config.log_every, self._config.steps):
      return
    line = (
      f'step {number}/{self._config.steps}  loss {result["loss"]:.4f}  '
      f'lr {result["learning_rate"]:.2e}  |grad| {result["grad_norm"]:.3f}'
    )
    line += self._speed(number)
    self._progress.say(line)
    self._metrics.write(number, {
      'train/loss': result['loss'],
      'train/learning_rate': result['learning_rate'],
      'train/grad_norm': result['grad_norm'],
      'train/bad_steps': bad,
    })  # fmt: skip

  def _speed(self, number) -> str:
    """Writes what depends on the clock, and returns its part of the line."""
    rate = self._progress.rate()
    if rate is None:
      return ''
    line = f'  {rate.tokens_per_second:,.0f} tokens/s'
    self._productive += rate.seconds
    found = {'train/tokens_per_second': rate.tokens_per_second, PRODUCTIVE: self._productive}
    if self._mfu_seconds is not None:
      found['train/mfu'] = self._mfu_seconds / rate.step_seconds
      line += f'  MFU {100 * found["train/mfu"]:.1f} %'
    if self._started is not None:
      found['train/goodput'] = self._productive / max(time.time() - self._started, 1e-9)
    self._metrics.write(number, found)
    return f'{line}  ETA {duration(rate.seconds_left)}'


def mfu_seconds(config: ConfigDict, model: LanguageModel) -> float | None:
  """Seconds that a step would take at 100 % MFU; None if the devices' peak rate is not known."""
  peak = peak_of(jax.devices()[0])
  if peak is None:
    return None
  tokens = config.data.batch_size * config.data.seq_len
  flops = tokens * training_flops(model.config, config.data.seq_len)
  return flops / (peak.flops * jax.device_count())


def first_start(root: pathlib.Path) -> float | None:
  """When the run was first started, in seconds since 1970, by its starts.jsonl."""
  path = root / 'starts.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return datetime.fromisoformat(json.loads(lines[0])['date']).timestamp() if lines else None


def describe(
  root: pathlib.Path,
  config: ConfigDict,
  model: LanguageModel,
  corpus,
  abstract: TrainState,
  mesh: Mesh,
  start: int,
) -> str:
  """What is about to be trained, on what and where: the lines at the start of a run."""
  parameters = sum(x.size for x in jax.tree.leaves(abstract.params))
  tokens = config.data.batch_size * config.data.seq_len
  axes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
  placed = jax.tree.map(lambda x: x.sharding, abstract.params)
  processes = f', {jax.process_count()} processes' if jax.process_count() > 1 else ''
  few = ', fewer than a step takes' if corpus.train.num_tokens < tokens else ''
  return '\n'.join([
    sharding.table(abstract.params, placed),
    f'model    {parameters:,} parameters, {" ".join(model.config.pattern)} x '
    f'{model.config.num_layers // len(model.config.pattern)}',
    f'data     {corpus.train.num_tokens:,} tokens to train on{few}, '
    f'{corpus.validation.num_tokens:,} held out, {corpus.tokenizer.name} tokenizer',
    f'devices  {jax.device_count()} {jax.devices()[0].device_kind}: {axes}{processes}',
    f'steps    {start} to {config.steps}, {tokens:,} tokens each',
    f'workdir  {root}',
  ])  # fmt: skip
