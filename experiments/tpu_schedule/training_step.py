"""Compiles training steps for described TPU slices; prints JSON, a line a case."""

import collections
import json
import math
import runpy
import sys
import time

from rla_jax import sharding
from rla_jax.training import ahead_of_time, hlo
from rla_jax.training.flops import matmul_flops


def main(case: dict) -> dict:
  """Compiles the step of a config with the TPU kernels.

  Args:
    case: topology, config (a file), batch (sequences), time (tokens of each), mesh (devices by
      axis), remat.

  Returns:
    Memory of a chip in bytes; matrix products in FLOP, of all chips; the kernels' calls; the
    collectives, equal ones as one; and what `whole_sequences` finds.
  """
  config = runpy.run_path(case['config'])['get_config']()
  config.model.remat = case['remat']
  config.data.batch_size, config.data.seq_len = case['batch'], case['time']
  config.accumulate = 1
  devices = ahead_of_time.described_devices(case['topology'])
  mesh = sharding.make_mesh(**case['mesh'], devices=devices)
  begin = time.perf_counter()
  traced = ahead_of_time.trace_training_step(config, mesh)
  flops = matmul_flops(traced.jaxpr)
  compiled = ahead_of_time.lower(traced, mesh).compile()
  took = time.perf_counter() - begin
  memory, text = compiled.memory_analysis(), compiled.as_text()
  calls, exchanges = hlo.kernel_calls(text), hlo.collectives(text)
  return {
    'chips': len(devices),
    'compile_seconds': round(took),
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'aliased': memory.alias_size_in_bytes,
    'temporary': memory.temp_size_in_bytes,
    'program': memory.generated_code_size_in_bytes,
    'flops': flops,
    'kernels': _count((x.name.split('.')[0], x.times, x.operands) for x in calls),
    'collectives': _count(
      (x.op, x.times, x.operands, x.results, x.group, x.bytes, _place(x)) for x in exchanges
    ),
    'problems': whole_sequences(case, config, calls, exchanges),
  }


def whole_sequences(case, config, calls, exchanges) -> list[str]:
  """What contradicts that every chip runs the kernels on its own sequences and heads.

  Every kernel must take a chip's share of the tokens, and no array of tokens may be gathered, nor
  exchanged in any way within the blocks. The sequence length must be no other dimension of the
  model, or parameters look like tokens.
  """
  mesh, length = case['mesh'], case['time']
  rows = case['batch'] // (mesh['data'] * mesh['fsdp'])
  heads = config.model.num_heads // mesh['tensor']
  found = [] if calls else ['no kernel is in the program']
  for call in calls:
    token = f'[{rows},{length},{heads * config.model.head_dim}]'
    if not any(shape.endswith(token) for shape in call.operands):
      found.append(f'{call.name} has no operand {token} but {call.operands}')
  for exchange in exchanges:
    shapes = (*exchange.operands, *exchange.results)
    has_tokens = any(d in (length, rows * length) for x in shapes for d in hlo.sizes(x))
    in_block = '/blocks/' in exchange.op_name and exchange.op != 'all-reduce'
    if has_tokens and (exchange.op == 'all-gather' or in_block):
      found.append(f'{exchange.op} of tokens {exchange.results}: {exchange.op_name}')
  return found


def _place(exchange) -> str:
  """The end of the traced program's name for it, and whether it is in the backward pass."""
  name = exchange.op_name
  return ('backward ' if 'transpose(' in name else '') + '/'.join(name.split('/')[-3:])


def _count(rows) -> list:
  """Distinct rows with how often each runs; the second entry of a row is its own count."""
  counts = collections.Counter()
  for name, times, *rest in rows:
    counts[(name, *rest)] += math.nan if times is None else times
  return [[*row, count] for row, count in counts.items()]


if __name__ == '__main__':
  for one in json.loads(sys.argv[1]):
    print('RESULT ' + json.dumps(main(one)), flush=True)
