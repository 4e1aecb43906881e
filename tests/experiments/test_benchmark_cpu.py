"""The CPU benchmark: its plain form is right, and a small run writes what it says."""

import csv
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / 'experiments' / 'benchmark_cpu.py'


def test_a_small_run(tmp_path):
  """It checks every contender, the plain form too, before it times them."""
  done = subprocess.run(
    [sys.executable, SCRIPT, f'--out={tmp_path}', '--lengths=128', '--updates=additive', '--size=8',
     '--heads=1', '--rounds=2', '--budget=0', '--contenders=plain,chunked'],
    check=True, capture_output=True, text=True,
  )  # fmt: skip
  with (tmp_path / 'benchmark_cpu.csv').open() as file:
    lines = list(csv.DictReader(file))
  assert [(x['contender'], x['direction']) for x in lines] == [
    ('plain', 'forward'), ('chunked', 'forward'),
    ('plain', 'forward_backward'), ('chunked', 'forward_backward'),
  ]  # fmt: skip
  assert all(float(x['median_ms']) > 0 and int(x['rounds']) == 2 for x in lines)
  assert all(float(x['times_plain']) == 1 for x in lines if x['contender'] == 'plain')
  assert (tmp_path / 'benchmark_cpu.png').read_bytes().startswith(b'\x89PNG')
  assert 'tokens/s' in done.stdout


@pytest.mark.parametrize(
  ('flag', 'message'),
  [('--contenders=fast', "--contenders has ['fast']"), ('--lengths=100', 'multiples of 64')],
)
def test_wrong_flags(flag, message):
  done = subprocess.run([sys.executable, SCRIPT, flag], capture_output=True, text=True, check=False)
  assert done.returncode
  assert message in done.stdout + done.stderr
