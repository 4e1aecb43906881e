"""The chunked form against the float64 oracle; what it keeps in memory."""

import jax
import jax.numpy as jnp
import pytest
from jax.test_util import check_grads

from rla_jax.ops.chunk import scaled_product
from tests.ops import cases, harness
from tests.ops.suite import OperatorSuite


class TestChunked(OperatorSuite):
  implementation = 'chunked'


@pytest.mark.parametrize('update', cases.UPDATES)
@pytest.mark.parametrize('chunk_size', [1, 7, pytest.param(40, marks=pytest.mark.slow), 128])
def test_any_chunk_size(update, chunk_size):
  call = cases.BY_NAME['segments'].call(update)
  cotangents = cases.cotangents(call)
  got = harness.measured(call, cotangents, 'chunked', chunk_size)
  harness.assert_within(got, harness.expected(call, cotangents), harness.BARS['float32'])


def test_a_scaled_product_is_not_repeated_by_its_transpose():
  """Derivatives of both orders against differences; two products in the transpose, not three."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = (5, 1), (5, 4), (4, 3)
  with jax.enable_x64(True):
    args = [jax.random.normal(*x, dtype=jnp.float64) for x in zip(keys, shapes)]

    def function(*args):
      return scaled_product(*args, None)

    check_grads(function, args, order=2)
    transpose = jax.jit(lambda *args: jax.vjp(function, *args)[1](jnp.ones((5, 3))))
    assert transpose.lower(*args).compile().as_text().count(' dot(') == 2


@pytest.mark.parametrize('update', cases.UPDATES)
def test_memory_is_linear_and_a_few_times_the_arrays(update):
  """Forward and backward in float32, by the compiler's account: inputs and results included."""
  H, size = 4, 64

  def program_bytes(length):
    x = jax.ShapeDtypeStruct((1, length, H, size), jnp.float32)
    gate = jax.ShapeDtypeStruct((1, length, H), jnp.float32)

    def both(q, k, v, log_decay, beta, gamma, do):
      def operator(*tokens):
        return harness.OPERATORS[update](*tokens, implementation='chunked')[0]

      o, pull = jax.vjp(operator, q, k, v, log_decay, beta, gamma)
      return o, pull(do)

    found = jax.jit(both).lower(x, x, x, gate, gate, gate, x).compile().memory_analysis()
    return (
      found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
      - found.alias_size_in_bytes
    )  # fmt: skip

  short, long = program_bytes(1024), program_bytes(16384)
  for length, found in ((1024, short), (16384, long)):
    assert found <= 6 * (4 * 4 * length * H * size), f'{found} bytes at {length} tokens'
  assert long <= 16 * short
