"""Training: the config, the step, checkpoints, metrics, and the loop that puts them together.

    from rla_jax.training import get_config, train_and_evaluate

    config = get_config()
    config.data.path = 'my_text/*.txt'
    train_and_evaluate(config, workdir='runs/mine')

The same call again goes on where the run was left. Model and data have their own records,
`rla_jax.models.ModelConfig` and `rla_jax.data.DataConfig`, which the config has as sections.
"""

from rla_jax.training.config import get_config
from rla_jax.training.errors import (
  CheckpointError,
  ConfigError,
  DivergedError,
  TrainingError,
  WorkdirError,
)
from rla_jax.training.evaluate import Evaluation
from rla_jax.training.train import Outcome, train_and_evaluate

__all__ = [
  'CheckpointError',
  'ConfigError',
  'DivergedError',
  'Evaluation',
  'Outcome',
  'TrainingError',
  'WorkdirError',
  'get_config',
  'train_and_evaluate',
]
