"""What the compiler says of a step, and the nearest layout where it does not fit."""

import csv
import dataclasses
import importlib.util
import pathlib
import subprocess
import sys

import jax
import pytest

from rla_jax import sharding
from rla_jax.training import ConfigError, fit
from rla_jax.training.utilisation import Peak

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROOMY = Peak(flops=1e12, memory=1e12, memory_rate=1e11, link_rate=1e10)


@pytest.fixture
def config(config):
  config.model.vocab_size = 512
  config.model.model_dim = 64
  config.model.ffn_dim = 256
  config.data.batch_size = 16
  return config


def test_a_step_is_measured(config):
  found = fit.measure(config, sharding.make_mesh(data=1, fsdp=8), ROOMY)
  weights = 4 * 64 * 16 + 3 * 64 * 256 + 512 * 64  # Attention of 2 x 8, SwiGLU, head.
  tokens = 16 * 16
  attention = 4 * 2 * 8 * (16 + 1) / 2
  assert found.model_flops == pytest.approx(3 * tokens * (2 * weights + attention) / 8)
  assert 0.9 < found.flops / found.model_flops < 1.2  # Attention's masked half, and a one-hot.
  parameters = 512 * 64 * 2 + 4 * 64 * 16 + 3 * 64 * 256
  assert found.resident == pytest.approx(3 * 4 * parameters / 8, rel=0.1)  # Adam has two moments.
  assert found.resident < found.needed < 20 * found.resident
  gathered = sum(size for kind, (_, size) in found.communication.items() if 'gather' in kind)
  assert gathered >= 4 * 0.5 * parameters
  assert found.fits
  assert found.seconds == max(found.compute_seconds, found.link_seconds) > 0
  assert 'MFU at most' in str(found)


@pytest.mark.slow
def test_what_does_not_fit_gets_the_nearest_layout_that_does(config):
  whole = fit.measure(config, sharding.make_mesh(data=8), ROOMY)
  small = dataclasses.replace(ROOMY, memory=0.6 * whole.needed)
  failed = dataclasses.replace(whole, peak=small)
  assert not failed.fits
  found = fit.nearest(config, jax.devices(), failed)
  assert found.fits
  assert found.needed < small.memory
  assert (found.mesh, found.accumulate) != (failed.mesh, failed.accumulate)
  assert config.accumulate == 1  # The caller's config is as it was.
  tiny = dataclasses.replace(whole, peak=dataclasses.replace(ROOMY, memory=1e3))
  assert fit.nearest(config, jax.devices(), tiny) is None


def test_devices_without_known_rates_are_refused(config):
  with pytest.raises(ConfigError, match="peak rates of 'cpu' are not known"):
    fit.measure(config, sharding.make_mesh())


def test_a_row_is_known_by_what_was_changed(tmp_path):
  program = """
import pathlib, runpy, sys
from absl import app
module = runpy.run_path('experiments/compile.py')
layout = {'data': 1, 'fsdp': 8, 'seq': 1, 'tensor': 1, 'accumulate': 1}
app.run(lambda _: module['write'](pathlib.Path(sys.argv[1]), 'h200:8', layout))
"""
  table = tmp_path / 'layouts.csv'
  common = ['--config=configs/quickstart.py', '--topology=h200:8']
  for more in ([], ['--config.model.remat=both'], []):
    command = [sys.executable, '-c', program, str(table), *common, *more]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
  with table.open() as file:
    assert [row['overrides'] for row in csv.DictReader(file)] == ['model.remat=both', '']


def compile_both_ways(tmp_path, topology):
  """The program's rows for split parameters and for copies of them, and what it printed."""
  table = tmp_path / 'layouts.csv'
  command = [
    sys.executable, 'experiments/compile.py', '--config=configs/quickstart.py', f'--csv={table}',
    f'--topology={topology}', '--layout=data=2,fsdp=-1', '--layout=data=-1', '--vocab_size=256',
    '--config.model.dtype=bfloat16', '--config.model.chunk_size=64', '--config.data.batch_size=16',
  ]  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
  with table.open() as file:
    parts, copies = csv.DictReader(file)
  assert parts['topology'] == topology
  for row in (parts, copies):
    row.update({name: float(value) for name, value in row.items() if name.endswith('_gb')})
  assert parts['all_gather_gb'] > parts['reduce_scatter_gb'] > parts['all_reduce_gb'] > 0
  assert copies['all_reduce_gb'] > 0 == copies['reduce_scatter_gb'] == copies['all_gather_gb']
  return parts, copies, done.stdout


@pytest.mark.slow
def test_the_program_compiles_for_slices_that_are_not_there(tmp_path):
  """Split parameters are gathered and their gradients scattered; copies are summed whole."""
  pytest.importorskip('libtpu')
  parts, copies, _ = compile_both_ways(tmp_path, 'v5e:4x4')
  assert (parts['fsdp'], copies['data']) == ('8', '16')
  assert parts['state_gb'] < 0.2 * copies['state_gb']


@pytest.mark.slow
@pytest.mark.skipif(
  not any(importlib.util.find_spec(f'jax_cuda{n}_plugin') for n in (12, 13)),
  reason="JAX's compiler for CUDA is not installed (pip install -e '.[cuda]')",
)
def test_the_program_compiles_for_gpus_that_are_not_there(tmp_path):
  """With the Triton kernels, whose products are counted as what the recurrence needs."""
  parts, copies, printed = compile_both_ways(tmp_path, 'h200:8')
  assert (parts['fsdp'], copies['data']) == ('4', '8')
  assert parts['state_gb'] < 0.35 * copies['state_gb']
  assert '8 x NVIDIA H200' in printed
  assert 'in Triton kernels at least' in printed
