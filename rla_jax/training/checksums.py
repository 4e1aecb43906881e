"""Checksums of arrays, computed where they lie: one number, whatever the sharding.

A word w at flat index i counts as mix(w xor mix(i)), summed modulo 2^32, where mix is a bijection
of 32-bit words. One changed word therefore always changes the sum, and words that change places or
change together do except with probability 2^-32. Integer sums have no order, so the number does not
depend on how an array is sharded, and no array leaves its devices.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rla_jax.shapes import Array

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def describe(tree) -> dict[str, list]:
  """dtype, shape and checksum of each array, for JSON: {path: [dtype, shape, checksum]}."""
  sums = jax.device_get(_checksums(tree))
  return {
    path: [str(x.dtype), list(x.shape), int(total)]
    for (path, x), total in zip(named_leaves(tree), jax.tree.leaves(sums), strict=True)
  }


def named_leaves(tree) -> list[tuple[str, Array]]:
  """Leaves with their paths, as in `params/layers/norm/scale`."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(jax.tree_util.keystr(path, simple=True, separator='/'), x) for path, x in leaves]


@jax.jit
def _checksums(tree):
  return jax.tree.map(_checksum, tree)


def _checksum(x: Array) -> Array:
  size = x.dtype.itemsize
  if x.dtype == jnp.bool_:
    words = x.astype(jnp.uint8)
  else:
    words = jax.lax.bitcast_convert_type(x, _WORDS[min(size, 4)])  # 8 bytes: a trailing axis of 2.
  index, stride = jnp.zeros(words.shape, jnp.uint32), 1
  for axis in reversed(range(words.ndim)):
    place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    index += place * np.uint32(stride % 2**32)
    stride *= words.shape[axis]
  return jnp.sum(_mix(words.astype(jnp.uint32) ^ _mix(index)), dtype=jnp.uint32)


def _mix(x: Array) -> Array:
  """The finaliser of MurmurHash3, a bijection of 32-bit words (Appleby, public domain)."""
  x ^= x >> 16
  x *= np.uint32(0x85EBCA6B)
  x ^= x >> 13
  x *= np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
