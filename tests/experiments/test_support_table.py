"""The table's oracle against the independent one, its cells, and the command."""

import csv
import importlib.util
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import ops
from tests import oracle
from tests.experiments.conftest import forget
from tests.ops import harness

SCRIPT = pathlib.Path(__file__).parents[2] / 'experiments' / 'support_table.py'


@pytest.fixture(scope='module')
def script():
  spec = importlib.util.spec_from_file_location('support_table', SCRIPT)
  module = importlib.util.module_from_spec(spec)
  # Its dataclasses look their module up by name.
  sys.modules['support_table'] = module
  spec.loader.exec_module(module)
  yield module
  forget('support_table')


def test_rows_are_all_combinations(script):
  rows = script.rows()
  assert len(set(rows)) == len(rows) == 2 * 4 * 2


CHEAP = {('additive', 'fixed', False), ('delta', 'channel', True)}
ROWS = [(u, d, r) for u in ('additive', 'delta') for d in ('none', 'fixed', 'scalar', 'channel')
        for r in (False, True)]  # fmt: skip


@pytest.mark.parametrize(
  'parts', [pytest.param(p, marks=() if p in CHEAP else pytest.mark.slow) for p in ROWS], ids=str
)
def test_its_oracle_is_the_independent_one(script, parts):
  """Every row's values and gradients equal the numpy recurrence and its hand-written gradient."""
  row = script.Row(*parts)
  arrays = script.problem(row, 40, 6, 5)
  got = script.oracle(row, arrays)
  call = oracle.Call(**arrays, update=row.update)
  rng = np.random.default_rng(1)
  outputs = {n: x for n, x in oracle.recurrence(call).items() if n != 'innovation'}
  into = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in sorted(outputs.items())}
  harness.assert_within(got, harness.expected(call, into), harness.BARS['float64'])


def test_a_cell_holds_errors_or_a_reason(script):
  row = script.Row('delta', 'scalar', True)
  arrays = script.problem(row, 40, 6, 5)
  want = script.oracle(row, arrays)
  cells = {n: script.measure(row, n, arrays, want, False) for n in ('chunked', 'triton', 'pallas')}
  assert 0 < cells['chunked'].value_error < 2e-5
  assert 0 < cells['chunked'].gradient_error < 2e-5
  assert 'NVIDIA' in cells['triton'].reason
  assert 'TPU' in cells['pallas'].reason
  text = script.render({row: cells})
  assert '(a) the Triton kernels run on NVIDIA GPUs' in text
  assert ' / ' in text.splitlines()[1]
  # An error above the bar is seen.
  wrong = script.measure(row, 'chunked', arrays, want | {'dk': 1.001 * want['dk']}, False)
  assert not wrong.exact
  assert wrong.gradient_name == 'dk'
  assert ' !' in script.render({row: {'chunked': wrong}})


@pytest.mark.slow
def test_the_command_leaves_no_cell_empty(tmp_path):
  subprocess.run(
    [sys.executable, SCRIPT, f'--out={tmp_path}', '--length=70', '--key_dim=8', '--value_dim=8'],
    check=True, capture_output=True,
  )  # fmt: skip
  with (tmp_path / 'support_table.csv').open() as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == 16 * len(ops.IMPLEMENTATIONS)
  for line in lines:
    assert bool(line['reason']) != bool(line['value_error'] and line['gradient_error'])
  assert jnp.isfinite(jnp.array([float(x['value_error']) for x in lines if x['value_error']])).all()
