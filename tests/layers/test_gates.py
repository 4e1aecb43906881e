"""Gates: ranges, initial values, precision, and the direction of a bf16 layer's gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import layers
from rla_jax.layers.gates import compute_gates, gate_parameters
from tests.layers import helpers

GATES = ('A_log', 'dt_bias', 'decay_proj', 'beta_proj', 'gamma_proj')


def gates_of(x, **changes):
  s = layers.Settings(num_heads=4, head_dim=8, **changes)
  made = gate_parameters(s, x.shape[-1])
  params = {n: init(jax.random.key(i), shape, jnp.float32) for i, (n, (shape, init)) in
            enumerate(made.items())}  # fmt: skip
  return compute_gates(s, params, x)


@pytest.mark.parametrize('decay', ['fixed', 'scalar', 'channel', 'channel_sigmoid'])
def test_decays_are_float32_within_zero_and_one(decay):
  x = 2 * helpers.inputs(dtype=jnp.bfloat16)
  log_decay, beta, gamma = gates_of(x, decay=decay)
  shape = (2, 13, 4, 8) if decay.startswith('channel') else (2, 13, 4)
  assert log_decay.shape == shape and log_decay.dtype == jnp.float32
  assert (log_decay <= 0).all()
  for gate in (beta, gamma):
    assert gate.dtype == jnp.float32 and (gate > 0).all() and (gate < 1).all()


def test_beta_up_to_two_and_gamma_as_beta():
  x = 10 * helpers.inputs()
  _, beta, gamma = gates_of(x, allow_neg_eigval=True)
  assert 1.5 < beta.max() <= 2 and gamma.max() <= 1
  _, beta, gamma = gates_of(x, gamma_is_beta=True)
  np.testing.assert_array_equal(beta, gamma)
  assert gates_of(x, decay='none', write='one', residual=False) == (None, None, None)


def test_gates_of_one_number_a_head_are_one_product():
  """So that their gradients in x are one array, in place of a float32 one each."""
  x = helpers.inputs(dtype=jnp.bfloat16)
  assert str(jax.make_jaxpr(gates_of)(x)).count('dot_general') == 1
  _, beta, gamma = gates_of(x)
  for name, gate in (('beta', beta), ('gamma', gamma)):
    names = list(gate_parameters(layers.Settings(num_heads=4, head_dim=8), x.shape[-1]))
    key = jax.random.key(names.index(f'{name}_proj'))
    kernel = layers.Settings().kernel_init(key, (x.shape[-1], 4), jnp.float32)
    assert helpers.error(gate, jax.nn.sigmoid(x.astype(jnp.float32) @ kernel)) < 1e-6


def test_initial_decay_is_mamba2s():
  """softplus(dt_bias) is log-uniform in [0.001, 0.1], exp(A_log) uniform in [1, 16]."""
  layer = layers.ResidualDeltaNet(num_heads=4096, head_dim=1)
  shapes = gate_parameters(layer.plain(), 1)
  made = {n: shapes[n][1](jax.random.key(0), shapes[n][0]) for n in ('A_log', 'dt_bias')}
  step, rate = np.logaddexp(0, np.float64(made['dt_bias'])), np.exp(np.float64(made['A_log']))
  assert step.min() > 0.00099 and step.max() < 0.101
  assert abs(np.log(step).mean() - np.log(0.01)) < 0.1
  assert rate.min() >= 0.99 and rate.max() < 16.1 and abs(rate.mean() - 8.5) < 0.3


@pytest.mark.parametrize('name', ['rdn', 'rla'])
def test_gate_gradients_of_a_bf16_layer_keep_their_direction(name):
  """Cosine with the float64 gradient, at the float64 values of the same bf16 inputs."""
  options = {'implementation': 'chunked', 'num_heads': 2, 'num_qk_heads': None, 'head_dim': 32}
  x = helpers.inputs(256, batch=2).astype(jnp.bfloat16)
  weight = jax.random.normal(jax.random.key(7), x.shape)
  params = helpers.init(helpers.make(name, **options))

  def gradient(layer, params, x, weight):
    def loss(params):
      y = layer.apply({'params': params}, x)
      return (weight * y.astype(weight.dtype)).sum()

    return jax.jit(jax.grad(loss))(params)

  got = gradient(helpers.make(name, **options, dtype=jnp.bfloat16), params, x, weight)
  with jax.enable_x64(True):
    double = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, x, weight))
    want = gradient(helpers.make(name, **options, param_dtype=jnp.float64), *double)
    want = jax.tree.map(np.asarray, want)
  for gate in GATES:
    a, b = (np.asarray(g[gate], np.float64).ravel() for g in (got, want))
    cosine = a @ b / np.sqrt((a @ a) * (b @ b))
    print(f'{name} {gate} cosine {cosine:.6f}')
    assert cosine >= 0.999, (gate, cosine)
