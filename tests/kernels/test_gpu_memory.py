"""The Triton kernels' memory by XLA's account for an H200, which needs no card: gradients take the
place of what is saved, and no copy undoes that.
"""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ops_benchmark import contenders, timing
from ops_benchmark.problem import Problem
from rla_jax import sharding
from rla_jax.training import ahead_of_time

mesh = sharding.make_mesh(devices=ahead_of_time.described_devices('h200:1'))
whole = NamedSharding(mesh, PartitionSpec())
problem = Problem(sys.argv[1], 'forward_backward', int(sys.argv[2]), int(sys.argv[3]), 16, 128)
shape = (problem.batch, problem.length, 16, 128)
inputs = dict.fromkeys(('q', 'k', 'v'), jax.ShapeDtypeStruct(shape, jnp.bfloat16))
gate = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
inputs |= dict.fromkeys(('log_decay', 'beta', 'gamma'), gate)
arguments = jax.eval_shape(lambda x: contenders.arguments(problem, x), inputs)
place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
with jax.set_mesh(mesh):
  traced = jax.jit(contenders.build(problem, 'triton')).trace(*jax.tree.map(place, arguments))
  compiled = ahead_of_time.lower(traced, mesh).compile()
print(timing.peak_bytes(compiled) / (8 * problem.qkvo_bytes))
"""


@pytest.mark.skipif(
  not any(map(importlib.util.find_spec, ('jax_cuda13_plugin', 'jax_cuda12_plugin'))),
  reason="no compiler for GPUs: pip install -e '.[cuda]'",
)
@pytest.mark.parametrize(
  ('operation', 'batch', 'length', 'most'),
  [('rdn', 16, 2048, 2.0), ('rdn', 4, 8192, 2.0), ('rla', 16, 2048, 2.0), ('gdn', 16, 2048, 1.6)],
)
def test_forward_and_backward_need_little_more_than_their_tensors(operation, batch, length, most):
  """Peak over the bytes of q, k, v, o and their gradients, 32768 tokens."""
  path = os.pathsep.join([str(ROOT), str(ROOT / 'experiments')])
  done = subprocess.run(
    [sys.executable, '-c', PROGRAM, operation, str(batch), str(length)],
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': path},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert float(done.stdout.split()[-1]) <= most
