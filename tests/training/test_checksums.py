"""A changed bit always changes the checksum; the sharding never does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.sharding import make_mesh
from rla_jax.training.checksums import describe


def checksum(x):
  ((_, _, total),) = describe({'x': jnp.asarray(x)}).values()
  return total


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool'])
def test_any_single_bit_counts(dtype):
  rng = np.random.default_rng(0)
  dtype = jnp.dtype(dtype)
  x = rng.integers(0, 2, (3, 5)).astype(dtype)
  expected = checksum(x)
  bits = 1 if dtype == jnp.bool_ else 8 * dtype.itemsize
  for element in range(x.size):
    for bit in range(bits):
      flipped = bytearray(x.tobytes())
      flipped[element * dtype.itemsize + bit // 8] ^= 1 << (bit % 8)
      changed = np.frombuffer(bytes(flipped), dtype).reshape(x.shape)
      assert checksum(changed) != expected, (element, bit)


def test_places_count():
  x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
  assert len({checksum(y) for y in (x, x.T.copy(), x[::-1], x[:, ::-1], x.ravel())}) >= 4


def test_sharding_does_not_count():
  x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
  mesh = make_mesh(data=4, tensor=2)
  expected = checksum(x)
  for spec in (('data', 'tensor'), ('tensor', None), (None, ('data', 'tensor'))):
    place = jax.NamedSharding(mesh, jax.P(*spec))
    assert checksum(jax.device_put(x, place)) == expected
