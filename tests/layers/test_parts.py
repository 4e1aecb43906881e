"""Norms and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.layers.norms import LayerNorm, RMSNorm, l2_norm, rms_norm
from rla_jax.layers.rope import rotate
from tests.layers import helpers


def test_l2_norm_has_the_asked_length_and_a_finite_gradient_at_zero():
  x = helpers.inputs()
  np.testing.assert_allclose(jnp.linalg.norm(l2_norm(x, 0.5), axis=-1), 0.5, rtol=1e-5)
  assert np.isfinite(jax.grad(lambda x: l2_norm(x).sum())(jnp.zeros(4))).all()
  assert l2_norm(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_rms_norm_equals_numpy_and_returns_its_input_dtype():
  x = helpers.inputs().astype(jnp.bfloat16)
  scale = jnp.linspace(0.5, 2, helpers.WIDTH)
  x64 = np.asarray(x, np.float64)
  want = np.asarray(scale) * x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)
  assert helpers.error(rms_norm(x, scale), want) < 1e-6
  y = RMSNorm().apply({'params': {'scale': scale}}, x)
  assert y.dtype == jnp.bfloat16 and helpers.error(y, want) < 5e-3


def test_rotation_depends_on_distance_alone():
  q, k = (jax.random.normal(jax.random.key(i), (1, 5, 1, 8)) for i in (0, 1))
  near, far = jnp.arange(5), jnp.arange(5) + 77

  def product(positions):
    return jnp.einsum('bthk,bshk->ts', rotate(q, positions), rotate(k, positions))

  np.testing.assert_allclose(product(near), product(far), atol=2e-5)
  assert helpers.error(product(near), product(3 * near)) > 0.1
  np.testing.assert_array_equal(rotate(q, jnp.zeros(5, jnp.int32)), q)
  with pytest.raises(ValueError, match='expected an even number'):
    rotate(q[..., :7], near)


def test_layer_norm_equals_numpy_and_returns_its_input_dtype():
  x = helpers.inputs().astype(jnp.bfloat16)
  scale, bias = jnp.linspace(0.5, 2, helpers.WIDTH), jnp.linspace(-1, 1, helpers.WIDTH)
  x64 = np.asarray(x, np.float64)
  want = np.asarray(scale) * (x64 - x64.mean(-1, keepdims=True)) / x64.std(-1, keepdims=True)
  y = LayerNorm().apply({'params': {'scale': scale, 'bias': bias}}, x)
  assert y.dtype == jnp.bfloat16 and helpers.error(y, want + np.asarray(bias)) < 5e-3
