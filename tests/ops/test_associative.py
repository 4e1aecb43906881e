"""The associative-scan form against the float64 oracle, and its two operators' associativity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.ops.associative import compose_dense, compose_diagonal
from tests.ops.suite import OperatorSuite


class TestAssociative(OperatorSuite):
  implementation = 'associative'


@pytest.mark.parametrize(
  ('compose', 'shape'),
  [(compose_dense, (5, 5)), (compose_diagonal, (5, 1)), (compose_diagonal, (1, 1))],
)
def test_composition_is_associative_and_applies_the_first_map_first(compose, shape):
  rng = np.random.default_rng(0)

  def draw():
    return jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=(5, 3)))

  def applied(one, state):
    matrix, offset = one
    return (matrix @ state if compose is compose_dense else matrix * state) + offset

  with jax.enable_x64(True):
    a, b, c = draw(), draw(), draw()
    state = jnp.asarray(rng.normal(size=(5, 3)))
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    for x, y in zip(left, right, strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)
    in_order = applied(c, applied(b, applied(a, state)))
    np.testing.assert_allclose(applied(left, state), in_order, rtol=1e-12, atol=1e-13)
