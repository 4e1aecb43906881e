"""Every key of a training config, and its typed form.

`get_config()` is the base that files in `configs/` start from. It is locked: an unknown key or a
value of another type fails where it is written. The sections `model` and `data` have the fields of
`ModelConfig` and `DataConfig`, which document them.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping

from jax.sharding import Mesh

from rla_jax.data import DataConfig
from rla_jax.models import ModelConfig
from rla_jax.training.errors import ConfigError

try:
  from ml_collections import ConfigDict, config_dict
except ModuleNotFoundError as error:
  raise ModuleNotFoundError(
    "ml_collections is not installed: pip install -e '.[train]'"
  ) from error

# Keys without effect on the trained parameters: they may change when a run is restarted.
FREE_KEYS = frozenset({
  'log_every', 'eval_every', 'eval_tokens', 'checkpoint_every', 'keep_checkpoints', 'keep_every',
  'keep_best', 'max_bad_steps', 'watchdog_seconds', 'statistics_every', 'profile.start',
  'profile.steps', 'compile_cache', 'wandb', 'mesh.data', 'mesh.fsdp', 'mesh.seq', 'mesh.tensor',
  'accumulate', 'device_tokens', 'data.cache_dir', 'data.num_threads', 'data.prefetch_batches',
})  # fmt: skip


def get_config() -> ConfigDict:
  """The base config: all keys, with the defaults of a small run."""
  c = ConfigDict()
  c.seed = 0  # of the initial parameters; the order of the data has data.seed
  c.steps = 1000  # optimiser steps of the whole run
  c.accumulate = config_dict.placeholder(int)  # parts of a batch, one after the other, to save
  c.accumulate = 1  # memory; None: as few as device_tokens allows on the mesh
  c.device_tokens = 65_536  # with accumulate None: tokens at most that a device has at a time

  c.model = _section(ModelConfig)  # vocab_size None: that of the tokenizer
  c.data = _section(DataConfig)

  c.optimizer = ConfigDict()  # the rate rises linearly, then falls as schedule says
  c.optimizer.name = 'adamw'  # or 'muon': for the blocks' matrices; AdamW for all else
  c.optimizer.schedule = 'cosine'  # or 'wsd': constant, then linear over the last decay_steps
  c.optimizer.decay_steps = config_dict.placeholder(int)  # of wsd; None: a tenth of steps
  c.optimizer.learning_rate = 3e-4  # peak, reached after warmup_steps
  c.optimizer.final_learning_rate = 3e-5  # at the last step
  c.optimizer.warmup_steps = 100  # steps of the linear rise from 0
  c.optimizer.beta1 = 0.9  # decay of the mean of gradients
  c.optimizer.beta2 = 0.95  # decay of the mean of their squares
  c.optimizer.eps = 1e-8  # added to the root of the latter
  c.optimizer.muon_beta = 0.95  # decay of Muon's momentum
  c.optimizer.weight_decay = 0.1  # a step takes learning_rate * weight_decay off each matrix
  c.optimizer.clip_norm = 1.0  # largest global norm of the gradients

  c.mesh = ConfigDict()  # devices along each axis; one of them may be -1: all that are left
  c.mesh.data = -1  # copies of the model, each with rows of its own
  c.mesh.fsdp = 1  # parts of each parameter; rows are split as well
  c.mesh.seq = 1  # parts of the sequence
  c.mesh.tensor = 1  # parts of heads and hidden units

  c.log_every = 10  # steps between log lines and metrics of training
  c.eval_every = 500  # steps between evaluations; the last step always has one
  c.eval_tokens = config_dict.placeholder(int)  # held-out tokens of an evaluation; None: all
  c.checkpoint_every = 500  # steps between checkpoints; the last step always has one
  c.keep_checkpoints = 3  # newest checkpoints that are kept
  c.keep_every = config_dict.placeholder(int)  # also keep those at multiples of this step
  c.keep_best = False  # also keep the one with the lowest evaluation loss
  c.ema_decay = config_dict.placeholder(float)  # of a mean of the parameters, which is evaluated
  c.max_bad_steps = 10  # steps in a row that are skipped, then stop
  c.max_spike = config_dict.placeholder(float)  # skip a step whose gradient norm is so many times
  # its running mean; None: skip only what is not finite
  c.watchdog_seconds = 1800.0  # without a step, an evaluation or a checkpoint: end; None: never
  c.statistics_every = config_dict.placeholder(int)  # steps between gate statistics and norms by
  # group of parameters; None: none
  c.profile = ConfigDict()  # a trace for XProf or Perfetto, in the folder `profile` of the run
  c.profile.start = config_dict.placeholder(int)  # step before which it begins; None: no trace
  c.profile.steps = 5  # steps that it covers
  c.compile_cache = config_dict.placeholder(str)  # folder of compiled programs; None: no cache
  c.wandb = config_dict.placeholder(str)  # project at Weights & Biases; None: nothing is sent
  c.lock()
  c.model.layer_options.unlock()  # Its keys are layers' names; ModelConfig knows which there are.
  return c


def check(config: ConfigDict) -> DataConfig:
  """Checks values and the combinations that need neither files nor devices.

  Returns:
    The section `data` as a record; `model_config` makes that of `model`.

  Raises:
    ConfigError: names the key, its value and what was expected.
  """
  for path, least in _LEAST.items():
    value = _get(config, path)
    if value is not None and value < least:
      raise ConfigError(f'{path} is {value}, expected at least {least}')
  for path in ('optimizer.learning_rate', 'optimizer.clip_norm', 'optimizer.eps',
               'watchdog_seconds'):  # fmt: skip
    value = _get(config, path)
    if value is not None and not value > 0:
      raise ConfigError(f'{path} is {value}, expected more than 0')
  for path in ('optimizer.beta1', 'optimizer.beta2', 'optimizer.muon_beta', 'ema_decay'):
    value = _get(config, path)
    if value is not None and not 0 <= value < 1:
      raise ConfigError(f'{path} is {value}, expected at least 0 and less than 1')
  for path, known in _CHOICES.items():
    if _get(config, path) not in known:
      raise ConfigError(f'{path} is {_get(config, path)!r}, expected one of {list(known)}')
  if config.max_spike is not None and not config.max_spike > 1:
    raise ConfigError(f'max_spike is {config.max_spike}, expected more than 1')
  if config.optimizer.warmup_steps >= config.steps:
    raise ConfigError(
      f'optimizer.warmup_steps is {config.optimizer.warmup_steps}, '
      f'expected less than steps, {config.steps}'
    )
  if config.data.batch_size % (config.accumulate or 1):
    raise ConfigError(
      f'accumulate is {config.accumulate}, which does not divide '
      f'data.batch_size, {config.data.batch_size}'
    )
  _record(ModelConfig, config, 'model', vocab_size=config.model.vocab_size or 1)
  return _record(DataConfig, config, 'data')


def model_config(config: ConfigDict, vocab_size: int) -> ModelConfig:
  """The section `model` as a record.

  Args:
    config: the whole config.
    vocab_size: of the tokenizer.

  Raises:
    ConfigError: the model's vocabulary is smaller than the tokenizer's.
  """
  size = vocab_size if config.model.vocab_size is None else config.model.vocab_size
  if size < vocab_size:
    raise ConfigError(
      f'model.vocab_size is {size}, smaller than that of the tokenizer '
      f'{config.data.tokenizer!r}, {vocab_size}'
    )
  return _record(ModelConfig, config, 'model', vocab_size=size)


def settled(config: ConfigDict, mesh: Mesh) -> ConfigDict:
  """A copy of the config with the parts that a batch is cut into on this mesh as `accumulate`.

  Args:
    config: the whole config; accumulate None: the fewest parts that leave every device whole rows
      and no more than device_tokens tokens at a time, or one row.
    mesh: from `sharding.make_mesh`.
  """
  config = config.copy_and_resolve_references()
  if config.accumulate is None:
    rows = -(-config.data.batch_size // (mesh.shape['data'] * mesh.shape['fsdp']))
    most = max(1, config.device_tokens * mesh.shape['seq'] // config.data.seq_len)
    config.accumulate = next(
      parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= most
    )
  return config


_LEAST = {
  'steps': 1, 'accumulate': 1, 'device_tokens': 1, 'optimizer.final_learning_rate': 0,
  'optimizer.warmup_steps': 0, 'optimizer.weight_decay': 0, 'log_every': 1, 'eval_every': 1,
  'eval_tokens': 1, 'checkpoint_every': 1, 'keep_checkpoints': 1, 'keep_every': 1,
  'max_bad_steps': 0, 'statistics_every': 1, 'profile.start': 1, 'profile.steps': 1,
  'optimizer.decay_steps': 1,
}  # fmt: skip
_CHOICES = {'optimizer.name': ('adamw', 'muon'), 'optimizer.schedule': ('cosine', 'wsd')}


def leaves(config: ConfigDict, prefix: str = '') -> dict[str, object]:
  """Values by the dotted path of their key, in the config's order."""
  found = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      found |= leaves(value, f'{prefix}{key}.')
    else:
      found[prefix + key] = value
  return found


def _section(record: type) -> ConfigDict:
  """The fields of a dataclass and their defaults; those that may be None keep their type."""
  section, hints = ConfigDict(), typing.get_type_hints(record)
  for field in dataclasses.fields(record):
    value = None if field.default is dataclasses.MISSING else field.default
    if value is None:
      value = config_dict.placeholder(_type(hints[field.name]))
    elif isinstance(value, Mapping):
      value = ConfigDict(dict(value))
    section[field.name] = value
  return section


def _type(hint) -> type:
  """The first type of `X | Y | None`."""
  kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
  return kinds[0] if kinds else hint


def _record(record: type, config: ConfigDict, section: str, **values):
  try:
    return record(**(config[section].to_dict() | values))
  except (TypeError, ValueError) as error:
    raise ConfigError(f'{section}: {error}') from error


def _get(config: ConfigDict, path: str):
  for key in path.split('.'):
    config = config[key]
  return config
