"""The schedule's shape, and what weight decay is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.models import LanguageModel
from rla_jax.training.config import get_config, model_config
from rla_jax.training.optimizer import decays, learning_rate, make_optimizer, muon_labels


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


def test_wsd_is_constant_and_then_falls_linearly():
  config = get_config()
  config.steps = 100
  config.optimizer.update({
    'schedule': 'wsd', 'warmup_steps': 10, 'decay_steps': 20, 'learning_rate': 1.0,
    'final_learning_rate': 0.2,
  })  # fmt: skip
  rates = [float(learning_rate(jnp.int32(done - 1), config)) for done in (5, 10, 50, 80, 90, 100)]
  np.testing.assert_allclose(rates, [0.5, 1.0, 1.0, 1.0, 0.6, 0.2], rtol=1e-5)


def test_muon_orthogonalises_every_layer_s_matrix_and_nothing_else():
  config = get_config()
  config.optimizer.name = 'muon'
  config.optimizer.weight_decay = 0.0
  rng = np.random.default_rng(0)
  shapes = {
    'embedding': (12, 8), 'head': (8, 12),
    'blocks': {'block_0': {'mixer': {
      'q_proj': (2, 8, 8), 'beta_proj': (2, 8, 2), 'decay_proj': (2, 8, 2), 'q_conv': (2, 4, 8),
      'A_log': (2, 2),
    }, 'ffn': {'up_proj': (2, 8, 24)}}},
  }  # fmt: skip
  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), 'f4'), shapes, is_leaf=is_shape)
  labels = muon_labels(params)
  assert labels['embedding'] == labels['head'] == 'adamw'
  mixer = labels['blocks']['block_0']['mixer']
  assert {name for name, label in mixer.items() if label == 'muon'} == {'q_proj'}
  assert labels['blocks']['block_0']['ffn']['up_proj'] == 'muon'

  optimizer = make_optimizer(config)
  updates, _ = optimizer.update(params, optimizer.init(params), params)
  up = updates['blocks']['block_0']['ffn']['up_proj']
  for layer in up:  # Each layer's own: singular values near 1 times the scale, 0.2 sqrt(24).
    values = np.linalg.svd(layer, compute_uv=False) / (0.2 * 24**0.5)
    assert 0.5 < values.min() <= values.max() < 1.5
  adam = make_optimizer(get_config())
  other, _ = adam.update(params, adam.init(params), params)
  sizes = [float(jnp.sqrt(jnp.mean(x['blocks']['block_0']['ffn']['up_proj'] ** 2)))
           for x in (updates, other)]  # fmt: skip
  assert sizes[0] == pytest.approx(0.2 * (24 / 24) ** 0.5, rel=0.3)
  plain = other['embedding'] - get_config().optimizer.weight_decay * params['embedding']
  np.testing.assert_allclose(updates['embedding'], plain, rtol=1e-4, atol=1e-6)
