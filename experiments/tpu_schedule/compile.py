"""Compiles one operator for a described TPU, in a process of its own; prints JSON.

The compiler reads the folder of its dump once, when it is loaded: hence a process a case.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rla_jax import ops
from rla_jax.kernels.residual import tpu
from rla_jax.kernels.residual.tpu import blocks


def main(case: dict) -> dict:
  """Compiles forward and backward of a case; memory in bytes, by pass."""
  device = topologies.get_topology_desc(
    platform='tpu', topology_name=case['topology']
  ).devices[0]
  mesh = Mesh(np.array([device]), ('x',))
  whole = NamedSharding(mesh, PartitionSpec())
  batch, time, heads, size = (case[name] for name in ('batch', 'time', 'heads', 'size'))
  residual = case['rule'] in ('rla', 'rdn')
  update = 'delta' if case['rule'] in ('rdn', 'gdn') else 'additive'

  def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

  wide = struct(batch, time, heads, size, dtype=jnp.dtype(case['dtype']))
  gate, state = struct(batch, time, heads), struct(batch, heads, size, size)
  args = [wide, wide, wide, gate, gate, state]
  if residual:
    args += [gate, state]

  def operator(q, k, v, log_decay, beta, base, gamma=None, residual=None):
    if case['implementation'] == 'pallas':
      return tpu.residual_attention(
        q, k, v, log_decay, beta, gamma, base, residual, None,
        update=update, clip=1.0, readout='gated',
      )  # fmt: skip
    function = ops.residual_delta_rule if update == 'delta' else ops.residual_linear_attention
    initial = ops.ResidualState(base, residual)
    o, new = function(
      q, k, v, log_decay, beta, gamma, initial_state=initial,
      implementation=case['implementation'],
    )  # fmt: skip
    return o, new.base, new.residual

  def forward_backward(args, cotangents):
    out, transpose = jax.vjp(lambda *args: [x for x in operator(*args) if x is not None], *args)
    return out, transpose(cotangents)

  cotangents = [wide] + [state] * (2 if residual else 1)
  found = {}
  with jax.set_mesh(mesh):  # some lowering rules ask for the kind of the current device
    if case['implementation'] == 'pallas':
      limits = blocks.heuristic(None, False)
      itemsize = wide.dtype.itemsize
      chunks, block_heads, padded, _ = blocks.choose(
        limits, time=time, heads=heads, keys=heads, key_dim=size, value_dim=size, itemsize=itemsize
      )
      head = blocks.grid_step_bytes(limits.chunk, chunks, padded, padded, itemsize)
      found |= {'chunk': limits.chunk, 'block_heads': block_heads}
      found |= {'vmem_estimate': block_heads * head, 'vmem_limit': limits.vmem}
    for name, function, arguments in (
      ('forward', operator, args),
      ('forward_backward', forward_backward, (args, cotangents)),
    ):
      lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=('tpu',))
      found[name] = _measures(lowered.compile())
  return found


def _measures(compiled) -> dict:
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  return {
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
    'flops': cost.get('flops', 0.0),
    'bytes': cost.get('bytes accessed', 0.0),
  }


if __name__ == '__main__':
  print('RESULT ' + json.dumps(main(json.loads(sys.argv[1]))))
