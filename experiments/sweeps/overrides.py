"""Configs with overrides of the command line."""

import json
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from rla_jax.training import ConfigError
from rla_jax.training.command_line import unknown_key
from rla_jax.training.config import check, leaves


def with_overrides(get_config: Callable[[], ConfigDict], overrides: Sequence[str]) -> ConfigDict:
  """The config with keys replaced, checked.

  Args:
    get_config: makes it.
    overrides: such as 'steps=1414' or 'data.path=mqar_reassigned'.

  Raises:
    ConfigError: what `get_config` refuses, an unknown key, a wrong value.
  """
  try:
    config = get_config()
    changes = dict(_parse(item) for item in overrides)
    for key in changes:
      if key not in leaves(config):
        raise ValueError(unknown_key(key, config))
    config.update_from_flattened_dict(changes)
  except (ValueError, TypeError) as error:
    raise ConfigError(' '.join(str(error).split())) from error
  check(config)
  return config


def _parse(item: str):
  key, equals, value = item.partition('=')
  if not equals:
    raise ValueError(f'--set={item}; expected key=value')
  try:
    return key, json.loads(value)
  except ValueError:
    return key, value
