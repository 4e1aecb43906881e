"""The emulation of the kernels' roundings: it is the recurrence, and errs as the kernels do."""

import csv
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'experiments'))

from ops_benchmark import markdown, rounding  # noqa: E402

from tests.errors import error  # noqa: E402
from tests.oracle import Call, recurrence  # noqa: E402

TOKENS = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma')


def drawn(kinds=1):
  with jax.enable_x64(True):
    return rounding.draw(32, kinds, 0, 256)


def walked(inputs, variant=None):
  with jax.enable_x64(True):
    return [np.asarray(x) for x in rounding.walk(inputs, variant)]


def test_exact_walk_is_the_recurrence():
  inputs = drawn(kinds=2)
  tokens = (inputs[n][None] for n in TOKENS)
  wanted = recurrence(Call(*tokens, inputs['base'][None], inputs['residual'][None]))
  for name, x in zip(('base', 'residual'), walked(inputs), strict=True):
    assert error(x, wanted[name][0]) < 1e-12, name


def test_sums_down_the_columns_are_kept():
  rng = np.random.default_rng(0)
  X = np.eye(32) - np.tril(rng.random((2, 32, 32)), -1)
  weights = rng.random((2, 32))
  with jax.enable_x64(True):
    found, free = (
      np.einsum('hi,hij->hj', weights, np.asarray(Y) - X)
      for Y in (rounding.kept(jnp.asarray(X), weights), rounding.low(jnp.asarray(X)))
    )
  # Above the diagonal of the first columns there is no room.
  assert np.abs(found[:, 4:]).mean() < 0.1 * np.abs(free[:, 4:]).mean()
  assert np.abs(found).max() <= np.abs(free).max()


def test_kernels_err_as_the_emulation_does():
  pytest.importorskip('triton')
  from rla_jax.kernels.residual import gpu
  from rla_jax.kernels.residual.gpu import prepare

  assert (prepare.LEAST.value, prepare.MOST.value) == (rounding.LEAST, rounding.MOST)
  inputs = drawn()
  dtypes = ['bfloat16'] * 3 + ['float32'] * 3
  tokens = (jnp.asarray(inputs[n][None], d) for n, d in zip(TOKENS, dtypes, strict=True))
  states = (jnp.asarray(inputs[n][None], jnp.float32) for n in ('base', 'residual'))
  _, *found = gpu.residual_attention(
    *tokens, *states, None, update='delta', clip=1.0, readout='gated', interpret=True
  )
  exact, emulated = walked(inputs), walked(inputs, 'all')
  for name, x, y, z in zip(('base', 'residual'), found, emulated, exact, strict=True):
    x = np.asarray(x[0], np.float64)
    assert error(x, z) > 1e-3, name
    assert error(x, y) < 0.5 * error(x, z), (name, error(x, y), error(x, z))


def test_the_program_writes_its_table(tmp_path):
  args = ['--sizes=16', '--kinds=1,2', '--draws=1', '--length=64', f'--out={tmp_path}']
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  subprocess.run(
    [sys.executable, ROOT / 'experiments/state_rounding.py', *args], check=True, env=environment
  )
  with (tmp_path / 'state_rounding.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 2 * len(rounding.VARIANTS)
  assert markdown.rounding_table(rows, 16).count('\n') == 1 + len(rounding.VARIANTS)
