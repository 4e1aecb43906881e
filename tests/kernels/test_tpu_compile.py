"""The TPU kernels compile for real TPUs: libtpu compiles for a described one on any host."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip('libtpu', reason='the TPU compiler comes with the libtpu package')
ROOT = pathlib.Path(__file__).resolve().parents[2]
CHILD = ROOT / 'experiments/tpu_schedule/compile.py'


def compile_case(**case):
  """Compiles forward and backward in a process of its own; libtpu leaves flags in a process."""
  case = {
    'topology': 'v5e:2x2', 'rule': 'rdn', 'size': 128, 'dtype': 'bfloat16', 'batch': 1, 'time': 128,
    'heads': 1, 'implementation': 'pallas',
  } | case  # fmt: skip
  env = dict(os.environ, JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', PYTHONPATH=str(ROOT))
  env.pop('XLA_FLAGS', None)
  env['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # no chip is opened, so none needs a lock
  done = subprocess.run(
    [sys.executable, str(CHILD), json.dumps(case)], env=env, text=True, capture_output=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  result = next(x for x in done.stdout.splitlines() if x.startswith('RESULT '))
  return json.loads(result.removeprefix('RESULT '))


@pytest.mark.parametrize('rule', ['rla', 'rdn'])
def test_compiles_for_v5e(rule):
  found = compile_case(rule=rule)
  assert found['forward_backward']['arguments'] > found['forward']['arguments'] > 0


def test_heads_of_64_compile():
  compile_case(size=64, heads=2)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('size', [64, 128, 256])
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'])
def test_compiles_everywhere(topology, size, dtype):
  for rule in ('rla', 'rdn', 'gla', 'gdn'):
    compile_case(topology=topology, size=size, dtype=dtype, rule=rule, heads=8, time=512)
