"""Every baseline of the paper: builds at full size, trains small, is evaluated."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.evaluation import Scorer, Text, text_loss
from rla_jax.models import LanguageModel, count_parameters
from rla_jax.training.config import check, model_config
from rla_jax.training.evaluate import loss_sums
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.state import initializer
from rla_jax.training.step import train_step
from tests.evaluation import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASELINE = runpy.run_path(str(ROOT / 'configs' / 'baseline.py'))
QUICK = ('mamba2',)


@pytest.mark.parametrize('name', BASELINE['BASELINES'])
def test_has_the_size_of_the_paper_s_models(name):
  config = BASELINE['get_config'](name)
  check(config)
  assert count_parameters(model_config(config, 100_352)) == pytest.approx(1.55e9, rel=0.08)


def test_unknown_names_are_one_line():
  with pytest.raises(ValueError, match="unknown baseline 'rwkv'; expected one of transformer, "):
    BASELINE['get_config']('rwkv')


@pytest.mark.parametrize('name', [
  pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
  for name in BASELINE['BASELINES']
])  # fmt: skip
def test_trains_and_is_evaluated(name):
  config = BASELINE['get_config'](name)
  heads = min(config.model.num_heads, 4)
  options = {layer: {'num_kv_heads': 2} for layer in config.model.layer_options}
  config.update_from_flattened_dict({
    'model.vocab_size': models.TOKENIZER.vocab_size, 'model.num_layers': 2, 'model.model_dim': 16,
    'model.ffn_dim': 16, 'model.num_heads': heads, 'model.head_dim': 8, 'model.dtype': 'float32',
    'model.remat': 'none', 'model.loss_chunk': None, 'accumulate': 1, 'model.init_std': 0.02,
    'optimizer.warmup_steps': 0, 'optimizer.learning_rate': 0.01, 'model.chunk_size': 8,
  })  # fmt: skip
  config.model.layer_options.update(options)
  model = LanguageModel(model_config(config, models.TOKENIZER.vocab_size))
  optimizer = make_optimizer(config)
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 258, (2, 17)), jnp.int32)
  batch = {
    'tokens': tokens[:, :-1], 'targets': tokens[:, 1:],
    'segment_ids': jnp.zeros((2, 16), jnp.int32), 'loss_mask': jnp.ones((2, 16)),
  }  # fmt: skip
  step = jax.jit(functools.partial(
    train_step, loss_sums=functools.partial(loss_sums, model), optimizer=optimizer, config=config
  ))  # fmt: skip
  state = jax.jit(initializer(model, optimizer))(jax.random.key(0))
  losses = []
  for _ in range(3):
    state, result = step(state, batch)
    losses.append(float(result['loss']))
  assert losses[2] < losses[0] < 1.1 * np.log(258)
  scorer = Scorer(model, state.params, chunk=16, batch_tokens=16)
  found = text_loss(scorer, models.TOKENIZER, [Text('to be or not')])
  assert found.tokens == 12 and 0 < found.loss < 10
