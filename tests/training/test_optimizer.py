"""The schedule's shape, and what weight decay is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.models import LanguageModel
from rla_jax.training.config import get_config, model_config
from rla_jax.training.optimizer import decays, learning_rate


@pytest.fixture
def schedule():
  config = get_config()
  config.steps = 100
  config.optimizer.warmup_steps = 10
  config.optimizer.learning_rate = 1.0
  config.optimizer.final_learning_rate = 0.1
  return lambda done: float(learning_rate(jnp.int32(done - 1), config))


def test_schedule(schedule):
  assert schedule(1) == pytest.approx(0.1)
  assert schedule(5) == pytest.approx(0.5)
  assert schedule(10) == pytest.approx(1.0)
  assert schedule(55) == pytest.approx(0.55)  # Half way down the cosine.
  assert schedule(100) == pytest.approx(0.1)
  assert np.all(np.diff([schedule(n) for n in range(10, 101)]) < 0)


def test_no_warmup_starts_at_the_peak():
  config = get_config()
  config.optimizer.warmup_steps = 0
  assert float(learning_rate(jnp.int32(0), config)) == pytest.approx(3e-4, rel=1e-3)


def test_decay_skips_norms_gates_and_taps():
  config = get_config()
  sizes = {'num_layers': 1, 'model_dim': 8, 'num_heads': 2, 'head_dim': 4, 'ffn_dim': 8}
  config.model.update(sizes)
  model = LanguageModel(model_config(config, 10))
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
  found = {True: set(), False: set()}
  for path, decayed in jax.tree_util.tree_flatten_with_path(decays(params))[0]:
    found[decayed].add(jax.tree_util.keystr(path, simple=True, separator='/').split('/')[-1])
  assert found[False] == {'scale', 'norm_scale', 'A_log', 'dt_bias', 'q_conv', 'k_conv', 'v_conv'}
  assert {'embedding', 'head', 'q_proj', 'o_proj', 'gate_proj', 'beta_proj'} <= found[True]
