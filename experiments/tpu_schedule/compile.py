"""Compiles operators for described TPUs, in a process of its own; prints JSON, a line a case."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rla_jax import ops
from rla_jax.kernels.residual import tpu
from rla_jax.kernels.residual.tpu import blocks, step
from rla_jax.training import hlo
from rla_jax.training.ahead_of_time import described_devices

RULES = {
  'rla': ('additive', True), 'rdn': ('delta', True), 'gla': ('additive', False),
  'gdn': ('delta', False),
}  # fmt: skip
CHUNKED = 64  # tokens of a chunk in the plain form


def main(case: dict) -> dict:
  """Compiles the passes of a case.

  Args:
    case: topology, rule, size, dtype, batch, time, heads, and program: 'pallas', 'chunked' or
      'decode' (the kernel of one token).

  Returns:
    chunk, block_heads; passes: measures or the error of each by name; kernels: bytes read and
    written and vector memory of each by name.
  """
  mesh = Mesh(np.array(described_devices(case['topology'])[:1]), ('x',))
  found = {'passes': {}, 'kernels': {}}
  with jax.set_mesh(mesh):  # some lowering rules ask for the kind of the current device
    if case['program'] == 'pallas':
      found |= _blocks(case)
    found['step_heads'] = step.heads_of_block(case['heads'], 1, case['size'] ** 2)
    programs = {'pallas': _operator, 'chunked': _operator, 'decode': _step}
    for name, function, arguments in programs[case['program']](case, mesh):
      try:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=('tpu',))
        compiled = lowered.compile()
      except Exception as error:  # whatever a compiler raises is a finding
        found['passes'][name] = {'error': _first_line(error)}
        continue
      found['passes'][name] = _measures(compiled) | {'error': ''}
      for call in hlo.kernel_calls(compiled.as_text()):
        found['kernels'] |= _kernel(call)
  return found


def _operator(case, mesh):
  """Forward, forward and backward; of the plain form also of one chunk.

  XLA estimates the body of a loop once, so the arithmetic of the plain form, a loop over chunks, is
  that of a single chunk, in as many sequences as there are chunks.
  """
  update, residual = RULES[case['rule']]
  whole = NamedSharding(mesh, PartitionSpec())

  def operator(q, k, v, log_decay, beta, base, gamma=None, residual=None):
    if case['program'] == 'pallas':
      return tpu.residual_attention(
        q, k, v, log_decay, beta, gamma, base, residual, None,
        update=update, clip=1.0, readout='gated',
      )  # fmt: skip
    function = ops.residual_delta_rule if update == 'delta' else ops.residual_linear_attention
    o, new = function(
      q, k, v, log_decay, beta, gamma, initial_state=ops.ResidualState(base, residual),
      implementation='chunked', chunk_size=CHUNKED,
    )  # fmt: skip
    return o, new.base, new.residual

  def forward_backward(args, cotangents):
    out, transpose = jax.vjp(lambda *args: [x for x in operator(*args) if x is not None], *args)
    return out, transpose(cotangents)

  def arguments(batch, time):
    heads, size = case['heads'], case['size']

    def struct(*shape, dtype=jnp.float32):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    wide = struct(batch, time, heads, size, dtype=jnp.dtype(case['dtype']))
    gate, state = struct(batch, time, heads), struct(batch, heads, size, size)
    args = [wide, wide, wide, gate, gate, state] + ([gate, state] if residual else [])
    return args, [wide] + [state] * (1 + residual)

  args, cotangents = arguments(case['batch'], case['time'])
  yield 'forward', operator, args
  yield 'forward_backward', forward_backward, (args, cotangents)
  if case['program'] == 'chunked':
    chunks = case['batch'] * case['time'] // CHUNKED
    args, cotangents = arguments(chunks, CHUNKED)
    yield 'forward_one_chunk', operator, args
    yield 'forward_backward_one_chunk', forward_backward, (args, cotangents)


def _step(case, mesh):
  """The decode kernel; its states are donated, so that they are updated in place."""
  update, residual = RULES[case['rule']]
  whole = NamedSharding(mesh, PartitionSpec())
  batch, heads, size = case['batch'], case['heads'], case['size']

  def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

  wide = struct(batch, heads, size, dtype=jnp.dtype(case['dtype']))
  gate, state = struct(batch, heads), struct(batch, heads, size, size)

  def one_token(q, k, v, log_decay, beta, base, gamma=None, residual=None):
    return tpu.residual_attention_step(
      q, k, v, log_decay, beta, gamma, base, residual, update=update, clip=1.0, readout='gated'
    )

  args = [wide, wide, wide, gate, gate, state] + ([gate, state] if residual else [])
  yield 'step', one_token, args


def _blocks(case):
  """Tokens of a chunk, heads of a grid step and its vector memory, as the heuristic has them."""
  size, itemsize = case['size'], jnp.dtype(case['dtype']).itemsize
  limits = blocks.heuristic(None, False)
  chunks, heads, padded, _ = blocks.choose(
    limits, time=case['time'], heads=case['heads'], keys=case['heads'], key_dim=size,
    value_dim=size, itemsize=itemsize,
  )  # fmt: skip
  head = blocks.grid_step_bytes(limits.chunk, chunks, padded, padded, itemsize)
  return {
    'chunk': limits.chunk, 'chunks': chunks, 'block_heads': heads, 'vmem_estimate': heads * head,
    'vmem_limit': limits.vmem,
  }  # fmt: skip


def _measures(compiled) -> dict:
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  return {
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
    'flops': cost.get('flops', 0.0),
    'bytes': cost.get('bytes accessed', 0.0),
  }


def _kernel(call) -> dict:
  name = re.search(r'residual_([a-z_]*[a-z])', call.name)
  scoped = re.findall(r'"used_scoped_memory_configs":\[(.*?)\]', call.text)
  memory = [int(x) for x in re.findall(r'"memory_space":"1".*?"size":"(\d+)"', ''.join(scoped))]
  return {name[1] if name else call.name: {
    'hbm_bytes': sum(map(hlo.nbytes, (*call.operands, *call.results))),
    'vmem': sum(memory) if memory else None,
  }}  # fmt: skip


def _first_line(error) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return f'{type(error).__name__}: {" ".join(lines)[:400]}'


if __name__ == '__main__':
  for one in json.loads(sys.argv[1]):
    print('RESULT ' + json.dumps(main(one)), flush=True)
