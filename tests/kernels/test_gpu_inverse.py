"""The inverse as `prepare` stores it in 16 bits: its sums down the columns, and what pays for them.

float32 inputs of the same values say what is to be stored.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('triton')

from rla_jax.kernels.residual.gpu import blocks
from rla_jax.kernels.residual.gpu.context import Call, Config
from rla_jax.kernels.residual.gpu.prepare import MOST
from rla_jax.kernels.residual.gpu.tiles import BASE_OUT, RESIDUAL_OUT
from tests.kernels.test_gpu_kernels import Case, problem

INVERSES = {'base': (1, BASE_OUT.value), 'residual': (4, RESIDUAL_OUT.value)}  # matrix, weights


def stored(oracle, chunk: int, dtype: str) -> dict:
  """Inverses [N, C, C], and weights [N, C], of all chunks by state."""
  chosen = blocks.heuristic(
    delta=True, residual=True, key_dim=32, value_dim=32, dtype='bfloat16', heads=4, length=256
  )
  chosen = blocks.with_chunk(chosen, chunk, 64 // chunk)
  arrays = (jnp.asarray(x, dtype) for x in (oracle.q, oracle.k, oracle.v))
  gates = (jnp.asarray(x, jnp.float32) for x in (oracle.log_decay, oracle.beta, oracle.gamma))
  ids = None if oracle.segment_ids is None else jnp.asarray(oracle.segment_ids)
  squares, rows = Call(Config(True, True, 1.0, chosen, True), *arrays, *gates, ids).prepare()
  found = {}
  for name, (matrix, row) in INVERSES.items():
    found[name] = [
      np.asarray(x, np.float64).reshape(-1, *x.shape[3:])
      for x in (squares[:, :, :, matrix], rows[:, :, :, row])
    ]
  return found


@pytest.mark.parametrize('chunk', [16, 32, 64])
@pytest.mark.parametrize('kind', ['plain', 'resets, segments', 'extreme'])
def test_sums_down_the_columns_are_kept(chunk, kind):
  case = Case(T=256, G=2, H=2, K=32, V=32, common=0.9)
  if kind == 'resets, segments':
    case = dataclasses.replace(case, resets=True, segments=True)
  oracle, _ = problem(dataclasses.replace(case, dtype='bfloat16', extreme=kind == 'extreme'))
  wanted, found = (stored(oracle, chunk, dtype) for dtype in ('float32', 'bfloat16'))
  upper = np.triu(np.ones((chunk, chunk), bool), 1)
  for name in INVERSES:
    (exact, w), (X, _) = wanted[name], found[name]
    assert not exact[:, upper].any()
    np.testing.assert_allclose(X[:, ~upper], exact[:, ~upper], rtol=2**-8, atol=1e-4)
    # What is above the diagonal is as small as rounding, and as its row's weight.
    assert (np.abs(X) <= MOST.value * np.abs(w)[:, :, None] * (1 + 2**-8))[:, upper].all(), name
    free = np.einsum('ni,nij->nj', w, np.where(upper, 0, X) - exact)
    kept = np.einsum('ni,nij->nj', w, X - exact)
    assert np.abs(free).sum(), name
    assert np.abs(kept).max() <= np.abs(free).max() * 1.01, name
    if kind == 'plain':  # the first columns have no room
      assert np.abs(kept[:, 4:]).mean() < 0.35 * np.abs(free[:, 4:]).mean(), name
    # Gradients divide a column by its gate.
    gates = oracle.beta if name == 'base' else oracle.gamma
    gates = np.maximum(np.abs(np.moveaxis(gates, 1, 2)).reshape(-1, chunk), 1e-18)
    assert (np.abs(X * upper) <= 4 * gates[:, None]).all(), name
