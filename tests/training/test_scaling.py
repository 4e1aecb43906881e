"""The speed of a step on several meshes, and the program that tabulates it."""

import csv
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from rla_jax import sharding
from rla_jax.evaluation.results import read_rows, write_rows
from rla_jax.training import scaling
from rla_jax.training.config import model_config
from rla_jax.training.utilisation import PEAKS, training_flops

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_device_keeps_its_rows(config, monkeypatch):
  config.model.vocab_size = 64
  peak = PEAKS['NVIDIA H200']
  monkeypatch.setitem(PEAKS, jax.devices()[0].device_kind, peak)
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  found = scaling.measure(config, mesh, rows=3, steps=2, rounds=1)
  assert (found.rows, found.accumulate) == (3 * 2 * 2, 1)
  assert found.tokens_per_second == pytest.approx(12 * 16 / found.seconds)
  work = training_flops(model_config(config, 64), 16) * found.tokens_per_second
  assert found.mfu == pytest.approx(work / (8 * peak.flops))
  assert 1e4 < found.memory < 1e8
  assert config.data.batch_size == 8  # The caller's config is as it was.


RESULTS = sorted((ROOT / 'experiments/results/scaling').glob('*.csv'))


@pytest.mark.parametrize('path', RESULTS, ids=lambda path: path.name)
def test_the_page_has_what_was_measured(path):
  assert scaling.table(read_rows(path)) in (ROOT / 'docs/training.md').read_text(encoding='utf-8')


def where_a_step_goes(path):
  """Milliseconds: all kernels, matrix products, our Triton kernels, everything else."""
  ours = ('prepare', 'forward', 'sweep', 'gradients', 'queries', 'keys', 'backward')
  ours = [f'{name}_kernel' for name in ours]
  sums = dict.fromkeys(('products', 'ours', 'rest'), 0)
  for row in read_rows(path):
    is_product = any(word in row['kernel'] for word in ('nvjet', 'gemm'))
    name = 'products' if is_product else 'ours' if row['kernel'] in ours else 'rest'
    sums[name] += row['milliseconds']
  return sum(sums.values()), *sums.values()


PROFILES = sorted((ROOT / 'experiments/results/step_profile').glob('*.csv'))


@pytest.mark.parametrize('path', PROFILES, ids=lambda path: path.stem)
def test_the_page_tells_where_a_step_goes(path):
  cells = ' | '.join(f'{x:.1f}' for x in where_a_step_goes(path))
  text = (ROOT / 'docs/training.md').read_text(encoding='utf-8')
  assert re.search(rf'^\| {path.stem} \| [\d.]+ \| {re.escape(cells)} \|$', text, re.MULTILINE)


def test_a_table_says_what_was_measured_and_what_does_not_fit(tmp_path):
  row = {
    'length': 4096, 'rows_a_place': 16, 'overrides': 'model.remat=both', 'data': 1, 'fsdp': 2,
    'seq': 1, 'tensor': 1, 'step_seconds': 0.25, 'tokens_per_second': 524288.0, 'mfu': None,
    'memory_gb': 62.04, 'efficiency': 0.951, 'triton': False,
    'commit': '12e4567',
  }  # fmt: skip
  failed = row | dict.fromkeys(('step_seconds', 'tokens_per_second', 'memory_gb', 'efficiency'))
  write_rows(tmp_path / 'x.csv', [row, failed | {'overrides': None}])
  rows = read_rows(tmp_path / 'x.csv')
  assert rows[0]['triton'] is False
  assert scaling.table(rows).splitlines()[2:] == [
    '| 16 x 4,096 | fsdp 2 | remat=both | 250 | 524,288 |  | 62.0 | 95.1 % | 12e4567 |',
    '| 16 x 4,096 | fsdp 2 |  | does not fit |  |  |  |  | 12e4567 |',
  ]


@pytest.mark.slow
def test_the_program_measures_what_is_missing(tmp_path):
  table = tmp_path / 'scaling.csv'
  command = [
    sys.executable, 'experiments/scaling.py', '--config=configs/quickstart.py', f'--csv={table}',
    '--layout=data=-1', '--layout=seq=-1', '--steps=1', '--rows=1', '--vocab_size=64',
    '--config.model.num_layers=1', '--config.model.model_dim=32', '--config.data.seq_len=64',
  ]  # fmt: skip
  environment = {
    **os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '--xla_force_host_platform_device_count=4'
  }  # fmt: skip

  def rows(*more):
    subprocess.run([*command, *more], cwd=ROOT, env=environment, check=True, capture_output=True)
    with table.open() as file:
      return list(csv.DictReader(file))

  first = rows('--devices=1,2')
  assert [(x['data'], x['seq'], x['rows']) for x in first] == [
    ('1', '1', '1'), ('2', '1', '2'), ('1', '2', '1')
  ]  # fmt: skip
  for row in first:
    count = int(row['data']) * int(row['seq'])
    rate = float(row['tokens_per_second'])
    assert float(row['efficiency']) == pytest.approx(
      rate / (count * float(first[0]['tokens_per_second']))
    )
  again = rows()
  assert again[:3] == first
  assert [(x['data'], x['seq']) for x in again[3:]] == [('4', '1'), ('1', '4')]
  *known, other = rows('--devices=1', '--config.model.remat=none')
  assert known == again
  assert other['overrides'].endswith(' model.remat=none')
