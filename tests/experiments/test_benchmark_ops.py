"""The operators' benchmark judges by the right oracle, counts right and writes what it measured."""

import csv
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('absl')
pytest.importorskip('tqdm')

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'experiments'))

from ops_benchmark import accuracy, timing  # noqa: E402
from ops_benchmark.problem import Problem, make_inputs, on_device  # noqa: E402
from ops_benchmark.rows import Rows  # noqa: E402

from rla_jax import ops  # noqa: E402
from tests import oracle  # noqa: E402


@pytest.fixture(autouse=True)
def short_oracle(monkeypatch):
  monkeypatch.setattr(accuracy, 'LONGEST', 64)


def small(operation, length=45, dtype='float32'):
  return Problem(operation, 'forward_backward', 1, length, 2, 16, dtype)


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('operation', ['rdn', 'rla', 'gdn'])
def test_oracle_is_the_recurrence(operation, packed):
  """Against the numpy recurrence and its hand-written gradient."""
  problem = small(operation)
  arrays, segments, cotangents = accuracy._draw(problem, 3, packed, 0.5)
  values, gradients, innovation, _ = accuracy._oracle(problem, arrays, segments, cotangents)
  wide = {n: np.asarray(x, np.float64) for n, x in arrays.items()}
  update = 'delta' if problem.is_delta else 'additive'
  call = oracle.Call(**wide, segment_ids=segments, update=update, clip=accuracy.CLIP)
  wanted = oracle.recurrence(call)
  for name, x in values.items():
    np.testing.assert_allclose(x, wanted[name], rtol=1e-9, atol=1e-11)
  if problem.has_residual:
    np.testing.assert_allclose(innovation, wanted['innovation'], rtol=1e-9, atol=1e-11)
  exact = oracle.gradients(call, {n: np.asarray(x, np.float64) for n, x in cotangents.items()})
  for name, x in gradients.items():
    np.testing.assert_allclose(x, exact[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('operation', ['rdn', 'simple_gla'])
def test_right_implementation_passes(operation):
  report = accuracy.check(small(operation), 'chunked', 1, packed=True)
  assert report.failures('float32') == []
  assert report.flipped == 0


def test_wrong_implementation_fails(monkeypatch):
  def wrong(q, k, v, log_decay, beta, gamma, **options):
    o, state = ops.residual_delta_rule(q, k, v, log_decay, 1.001 * beta, gamma, **options)
    return o, state

  class Wrong:
    residual_delta_rule = staticmethod(wrong)
    residual_linear_attention = None
    ResidualState = ops.ResidualState

  monkeypatch.setattr(accuracy, 'ops', Wrong)
  failures = accuracy.check(small('rdn'), 'chunked', 1).failures('float32')
  assert any(f.startswith('o ') for f in failures)
  assert any(f.startswith('dbeta ') for f in failures)


def test_mask_is_read_off_the_gradient():
  """Entries near the bound take the side that explains dv; others never flip."""
  innovation = np.array([0.5, 0.99, 0.999, 1.001, 1.01, 2.0])
  mask = np.abs(innovation) < accuracy.CLIP
  dr = np.array([1.0, -2.0, 3.0, -1.0, 2.0, 1.0])
  smooth = np.linspace(-1, 1, 6)
  own = np.array([True, False, True, True, False, False])  # the implementation's
  dv = smooth + own * dr + 0.01
  wanted = smooth + mask * dr
  np.testing.assert_array_equal(accuracy._read_off_mask(mask, innovation, dr, dv, wanted), own)
  dv[[0, 5]] = [-dv[0], dv[5] + 1]  # far from the bound: an error, not a flip
  np.testing.assert_array_equal(accuracy._read_off_mask(mask, innovation, dr, dv, wanted), own)


def test_mask_is_pinned_until_it_settles(monkeypatch):
  """Of keys that are alike many entries lie near the bound, and each changes others' gradients."""
  problem = small('rla')
  arrays, segments, cotangents = accuracy._draw(problem, 4, False, 0.9)
  oracle = lambda *mask: accuracy._oracle(problem, arrays, segments, cotangents, *mask)  # noqa: E731
  values, _, innovation, _ = oracle()
  monkeypatch.setattr(accuracy, 'NEAR', 0.5)
  mask = np.abs(innovation) < accuracy.CLIP
  near = np.abs(np.abs(innovation) - accuracy.CLIP) < accuracy.NEAR
  own = mask ^ (near & (np.arange(near.size) % 3 == 0).reshape(near.shape))
  monkeypatch.setattr(accuracy, '_candidate', lambda *_: (values, oracle(own)[1]))
  check = functools.partial(accuracy.check, problem, 'any', 4, correlation=0.9)
  report = check()
  assert report.settled and report.errors['dv'] < 1e-12
  assert report.flipped == np.mean(own != mask)
  monkeypatch.setattr(accuracy, 'ROUNDS', 1)
  assert check().errors['dv'] > 0.01
  assert any('not settled' in f for f in check().failures('bfloat16'))


def test_wrong_bound_fails(monkeypatch):
  """A pinned mask explains it; that it is not the oracle's is told by how many entries flip."""
  problem = small('rla', length=64, dtype='bfloat16')
  call = accuracy._draw(problem, 5, False, 0.0)
  values, _, innovation, _ = accuracy._oracle(problem, *call)
  gradients = accuracy._oracle(problem, *call, np.abs(innovation) < 1.02 * accuracy.CLIP)[1]
  monkeypatch.setattr(accuracy, '_candidate', lambda *_: (values, gradients))
  (failure,) = accuracy.check(problem, 'any', 5).failures('bfloat16')
  assert failure.startswith('flipped_mask_entries')


def test_counts():
  """Of 32768 tokens with 16 heads of 128 in bfloat16."""
  size = (16, 2048, 16, 128)
  forward = Problem('rdn', 'forward', *size)
  both = Problem('rdn', 'forward_backward', *size)
  assert forward.qkvo_bytes == 2**27
  assert forward.bytes() == 4 * 2**27
  # 4 C C K + 10 C C V + 12 C K V a chunk of 64 tokens
  assert forward.flops() == 512 * 16 * (14 * 64 * 64 * 128 + 12 * 64 * 128 * 128)
  assert 2.5 < both.flops() / forward.flops() < 3.5
  assert Problem('flash', 'forward', 1, 2048, 16, 128).flops() == 4 * 16 * 2048**2 * 128 / 2
  decode = Problem('rdn', 'decode', 256, 1, 16, 128)
  assert decode.bytes() == 256 * 16 * 128 * 128 * 4 * 2 * 2
  assert forward.floor_seconds(4e12, 7e14) == pytest.approx(max(2**29 / 4e12, 1.7e11 / 7e14), 0.1)


def test_inputs_are_fresh_and_of_one_distribution():
  problem = Problem('rdn', 'forward', 2, 256, 4, 32, 'float32')
  host, device = make_inputs(problem, 1), on_device(problem, 1)
  again = make_inputs(problem, 2)
  for name, x in host.items():
    y = np.asarray(device[name])
    assert x.shape == y.shape and x.dtype == y.dtype == np.float32
    assert not np.array_equal(x, again[name])
    assert abs(x.mean() - y.mean()) < 0.05 and abs(x.std() - y.std()) < 0.05
  assert (host['log_decay'] < 0).all()


def test_timing_runs_the_function_every_time():
  """A call that depends on nothing but its inputs is not hoisted out of the loop, nor dropped."""
  runs = []

  def count(x):
    runs.append(1)
    return np.asarray(x)

  def function(x):
    return (jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x),)

  x = jnp.ones(4)
  timing.measure(timing.prepare(function, (x,)), (x,), repeats=1, target_seconds=0)
  dispatches = 1 + 1 + 4 + 2 + 1  # two and four to see how long one takes, a sample
  assert len(runs) == 1 + dispatches * timing.LOOP


def test_timing_carries_the_inputs_it_touched():
  """Carried untouched beside the touched ones, they would be copied whole in every run."""
  x = jnp.arange(4.0)
  prepared = timing.prepare(lambda x: (x + 1,), (x,))
  (carried,), _ = prepared.loop((x,), (x + 1,))
  assert 0 < carried[0] < 1e-20


def test_timing_refuses_zeros():
  x = jnp.ones(8)
  with pytest.raises(FloatingPointError, match='sums to 0'):
    timing.measure(timing.prepare(lambda x: (x * 0,), (x,)), (x,))


def test_rows_are_kept_as_they_come(tmp_path):
  """A stopped run leaves a whole file, and the next knows what it need not measure again."""
  path = tmp_path / 'speed.csv'
  source = {'commit': '7e22961', 'hardware': 'card', 'versions': 'jax 1'}
  first = Rows(path, source, ('operation', 'length'))
  first.add({'operation': 'rdn', 'length': 2048, 'milliseconds': 0.25})
  first.add({'operation': 'rdn', 'length': 8192, 'milliseconds': 0.5, 'extra': 'x'})
  with open(path, newline='') as file:
    assert [row['milliseconds'] for row in csv.DictReader(file)] == ['0.25', '0.5']
  again = Rows(path, source, ('operation', 'length'), resume=True)
  assert again.has({'operation': 'rdn', 'length': 8192})
  assert not again.has({'operation': 'rla', 'length': 8192})
  assert again.current()[0]['milliseconds'] == 0.25
  later = Rows(path, source | {'commit': 'b'}, ('operation', 'length'), resume=True)
  assert not later.has({'operation': 'rdn', 'length': 8192})
  later.add({'operation': 'rdn', 'length': 2048, 'milliseconds': 0.125})
  assert [row['commit'] for row in later.rows] == ['7e22961', '7e22961', 'b']
  assert [row['milliseconds'] for row in later.current()] == [0.125]
  assert Rows(path, source, ('operation',)).rows == []


def test_command_refuses_an_unknown_suite(tmp_path):
  command = [sys.executable, 'experiments/benchmark_ops.py', '--suites=sped', f'--out={tmp_path}']
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 1
  assert "error: --suites has 'sped'; expected some of ['accuracy', " in done.stderr


def test_command_writes_what_it_measured(tmp_path):
  command = [
    sys.executable, 'experiments/benchmark_ops.py', '--suites=accuracy,decode', '--operations=rdn',
    '--accuracy_sizes=16', '--accuracy_lengths=1', '--seed=7',
    '--implementations=chunked,triton', '--sequences=32', '--width=64', '--sizes=16',
    '--dtype=float32', '--repeats=7', f'--out={tmp_path}',
  ]  # fmt: skip
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  with open(tmp_path / 'speed.csv') as file:
    (row,) = csv.DictReader(file)
  assert (row['operation'], row['implementation'], row['direction']) == ('rdn', 'chunked', 'decode')
  assert float(row['milliseconds']) > 0
  for column in ('date', 'commit', 'hardware', 'versions', 'command'):
    assert row[column]
  assert 'rdn triton decode 1: not run:' in done.stderr + done.stdout
  with open(tmp_path / 'accuracy.csv') as file:
    rows = list(csv.DictReader(file))
  assert {row['implementation'] for row in rows} == {'chunked'}
  assert len({row['seed'] for row in rows}) == len(rows) and min(int(r['seed']) for r in rows) >= 7
