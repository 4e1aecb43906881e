"""The TPU kernels compile for real TPUs: libtpu compiles for a described one on any host."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip('libtpu', reason='the TPU compiler comes with the libtpu package')
ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / 'experiments'
TOPOLOGIES = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')


def run(script, *arguments):
  """Runs a script of experiments/ in a process of its own: libtpu leaves flags in a process."""
  env = dict(os.environ, JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', PYTHONPATH=str(ROOT))
  env.pop('XLA_FLAGS', None)
  env['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # no chip is opened, so none needs a lock
  command = [sys.executable, str(EXPERIMENTS / script), *map(str, arguments)]
  return subprocess.run(command, env=env, text=True, capture_output=True)


def compile_cases(cases, script='tpu_schedule/compile.py'):
  """What a script that compiles says of each case; one process for all, which is slow to start."""
  done = run(script, json.dumps(cases))
  assert done.returncode == 0, done.stderr[-2000:]
  results = [x for x in done.stdout.splitlines() if x.startswith('RESULT ')]
  return [json.loads(x.removeprefix('RESULT ')) for x in results]


def check_operator(topology, rule, size, dtype, heads=1, time=128):
  """Forward, backward and the decode step of one operator compile and say what they need."""
  case = {'topology': topology, 'rule': rule, 'size': size, 'dtype': dtype, 'batch': 1}
  case |= {'heads': heads, 'time': time}
  found, decode = compile_cases([case | {'program': name} for name in ('pallas', 'decode')])
  errors = {name: x['error'] for name, x in found['passes'].items()}
  assert errors == {'forward': '', 'forward_backward': ''}
  kernels = {'forward', 'forward_saving', 'backward'}
  assert set(found['kernels']) == kernels | ({'prepare'} if rule in ('rdn', 'gdn') else set())
  for name, kernel in found['kernels'].items():
    assert kernel['hbm_bytes'] > 0
    # None is left where XLA holds all that a small call reads and writes in vector memory itself.
    assert 0 <= kernel['vmem'] <= found['vmem_limit'], name
  assert decode['passes']['step']['error'] == ''


@pytest.mark.parametrize(
  ('topology', 'rule', 'size', 'dtype'),
  [
    ('v5e:2x2', 'rdn', 128, 'bfloat16'), ('v5p:2x2x1', 'rla', 64, 'float32'),
    ('v6e:2x2', 'gdn', 256, 'bfloat16'),
  ],
)  # fmt: skip
def test_compiles(topology, rule, size, dtype):
  """One head and one chunk: small programs, which still have every kernel."""
  check_operator(topology, rule, size, dtype)


REMAT = """
import jax, jax.ad_checkpoint, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rla_jax.kernels.residual import tpu
from rla_jax.training import hlo
from rla_jax.training.ahead_of_time import described_devices

mesh = Mesh(np.array(described_devices('v5e:2x2')[:1]), ('x',))
whole = NamedSharding(mesh, PartitionSpec())

def struct(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

def loss(args):
  out = tpu.residual_attention(*args, None, update='additive', clip=1.0, readout='gated')
  named = [jax.ad_checkpoint.checkpoint_name(x, 'outputs') for x in out]
  return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in named)

policy = jax.checkpoint_policies.save_only_these_names(*tpu.SAVED, 'outputs')
wide, gate = struct(1, 128, 1, 128, dtype=jnp.bfloat16), struct(1, 128, 1)
state = struct(1, 1, 128, 128)
with jax.set_mesh(mesh):
  traced = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy))).trace(
    [wide, wide, wide, gate, gate, gate, state, state]
  )
  text = traced.lower(lowering_platforms=('tpu',)).compile().as_text()
print('KERNELS', *sorted(x.name for x in hlo.kernel_calls(text)))
"""


def test_remat_by_name_runs_no_forward_kernel_again(tmp_path):
  """With outputs and what the kernels save kept by name, the backward pass is its kernel alone."""
  (tmp_path / 'remat.py').write_text(REMAT)
  done = run(tmp_path / 'remat.py')
  assert done.returncode == 0, done.stderr[-2000:]
  line = next(x for x in done.stdout.splitlines() if x.startswith('KERNELS '))
  kernels = line.split()[1:]
  assert len(kernels) == 2
  assert sum('residual_forward_saving' in x for x in kernels) == 1
  assert sum('residual_backward' in x for x in kernels) == 1


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('size', [64, 100, 128, 256])
@pytest.mark.parametrize('topology', TOPOLOGIES)
def test_compiles_everywhere(topology, size, dtype):
  for rule in ('rla', 'rdn', 'gla', 'gdn'):
    check_operator(topology, rule, size, dtype, heads=2)


@pytest.mark.slow
def test_training_step_of_256_chips_gathers_no_tokens():
  """The kernels are in it; each chip runs them on its own sequences; it fits."""
  case = {
    'topology': 'v5e:16x16', 'config': 'configs/rdn_1p5b.py', 'batch': 256, 'time': 4096,
    'mesh': {'data': 1, 'fsdp': 256, 'tensor': 1}, 'remat': 'full',
  }  # fmt: skip
  (found,) = compile_cases([case], 'tpu_schedule/training_step.py')
  assert found['problems'] == []
  memory = found['arguments'] + found['outputs'] - found['aliased'] + found['temporary']
  assert memory < 16e9


@pytest.mark.slow
def test_report_goes_on_where_it_stopped(tmp_path):
  """A second run with another size compiles that alone; the tables have both."""
  options = [
    '--suite=kernels', '--topologies=v5e:2x2', '--rules=gla', '--dtypes=bfloat16', '--time=128',
    '--heads=1', '--programs=pallas', f'--out={tmp_path}',
  ]  # fmt: skip
  first = run('tpu_report.py', *options, '--sizes=64')
  assert first.returncode == 0, first.stderr[-2000:]
  kernels = (tmp_path / 'kernels.csv').read_text().splitlines()
  assert len(kernels) == 1 + 3
  assert all(float(row.split(',')[kernels[0].split(',').index('bound')]) > 0 for row in kernels[1:])
  second = run('tpu_report.py', *options, '--sizes=64,128')
  assert second.returncode == 0, second.stderr[-2000:]
  assert len((tmp_path / 'kernels.csv').read_text().splitlines()) == 1 + 6
  assert '2 cases' in second.stderr


def test_a_report_that_is_stopped_ends_its_compiler(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(EXPERIMENTS))
  from tpu_schedule import measure

  endless = 'import os, time\nprint("RESULT", os.getpid(), flush=True)\ntime.sleep(600)\n'
  (tmp_path / 'endless.py').write_text(endless)
  monkeypatch.setattr(measure, 'FOLDER', tmp_path)
  results = measure._children('endless', [{}, {}])
  compiler = next(results)
  os.kill(compiler, 0)
  results.close()
  with pytest.raises(ProcessLookupError):
    os.kill(compiler, 0)


def test_report_refuses_an_unknown_rule(tmp_path):
  done = run('tpu_report.py', '--rules=rla,foo', f'--out={tmp_path}')
  assert done.returncode == 1
  assert "error: --rules has 'foo'; expected some of ['rla', 'rdn', 'gla', 'gdn']" in done.stderr
  assert not list(tmp_path.iterdir())


def test_report_has_help():
  done = run('tpu_report.py', '--help')
  assert '--topologies' in done.stdout
  assert '--suite' in done.stdout
