"""Packed documents do not see each other, whatever a neighbour holds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.layers.conv import next_tail, short_convolution
from tests.layers import helpers


def documents(row):
  """(start, stop) of every document of a row of ids."""
  edges = [0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]
  return list(itertools.pairwise(edges))


def alone(x, row, start):
  """The document at the beginning of a sequence of the same shape: one compilation for all."""
  return jnp.repeat(jnp.roll(x[row : row + 1], -start, axis=1), helpers.BATCH, axis=0)


@pytest.mark.parametrize(
  'name,implementation', [('rdn', 'reference'), ('rdn', 'chunked'), ('rla', 'chunked')]
)
def test_packed_equals_separate_with_a_nan_neighbour(name, implementation):
  layer = helpers.make(name, implementation=implementation)
  params, x, ids = helpers.init(layer), helpers.inputs(), jnp.asarray(helpers.SEGMENT_IDS)
  apply = jax.jit(layer.apply)
  broken = x.at[0, 6].set(jnp.nan)  # the second document of the first row
  got = apply({'params': params}, broken, ids)
  for row in range(helpers.BATCH):
    for start, stop in documents(helpers.SEGMENT_IDS[row]):
      want = apply({'params': params}, alone(x, row, start), 0 * ids)[0, : stop - start]
      if row == 0 and start <= 6 < stop:
        assert np.isnan(got[row, 6:stop]).all()
        assert helpers.error(got[row, start:6], want[: 6 - start]) < 1e-5
      else:
        assert helpers.error(got[row, start:stop], want) < 1e-5


@pytest.mark.parametrize('name', ['attention', 'sliding_window_attention', 'retnet', 'mamba2'])
def test_packed_equals_separate(name):
  layer = helpers.make(name)
  params, x, ids = helpers.init(layer), helpers.inputs(), jnp.asarray(helpers.SEGMENT_IDS)
  apply = jax.jit(layer.apply)
  got = apply({'params': params}, x, ids)
  for row in range(helpers.BATCH):
    for start, stop in documents(helpers.SEGMENT_IDS[row]):
      want = apply({'params': params}, alone(x, row, start), 0 * ids)[0, : stop - start]
      assert helpers.error(got[row, start:stop], want) < 1e-5


def test_convolution_equals_a_loop_over_taps():
  rng = np.random.default_rng(0)
  x, taps, tail = (rng.normal(size=s) for s in ((2, 7, 3), (4, 3), (2, 3, 3)))
  index = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 2, 2, 2, 2]])
  want = np.zeros_like(x)
  for b in range(2):
    for t in range(7):
      for j in range(4):
        if t - j >= 0:
          want[b, t] += taps[3 - j] * x[b, t - j] * (index[b, t - j] == index[b, t])
        elif index[b, t] == 0:
          want[b, t] += taps[3 - j] * tail[b, 3 + t - j]
  got = short_convolution(*(jnp.asarray(a) for a in (x, taps, index, tail)))
  assert helpers.error(got, want) < 1e-6


def test_tail_forgets_other_documents():
  x = jnp.arange(1.0, 6.0)[None, :, None]
  index = jnp.array([[0, 0, 0, 1, 1]])
  np.testing.assert_array_equal(next_tail(x, 4, index)[0, :, 0], [0, 4, 5])
  np.testing.assert_array_equal(next_tail(x, 4)[0, :, 0], [3, 4, 5])
  short, tail = x[:, :1], jnp.array([7.0, 8.0, 9.0])[None, :, None]
  np.testing.assert_array_equal(next_tail(short, 4, None, tail)[0, :, 0], [8, 9, 1])
