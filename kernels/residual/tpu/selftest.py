"""Checks the TPU kernels on the chip at hand: `python -m rla_jax.kernels.residual.tpu.selftest`.

Every configuration runs forward and backward on a small problem, and outputs, states and gradients
are held against the recurrence in float64, token by token on the host. The decode step likewise; on
several chips also a sharded call. Prints a table; exits with 1 if anything is wrong.

--interpret runs the same on any host, without a TPU: it checks the kernels' arithmetic, not the
chip. It is slow: name few configurations.
"""

import argparse
import functools
import itertools
import sys
import time

import jax

from rla_jax.kernels.residual import judge, tpu
from rla_jax.kernels.residual.judge import Call
from rla_jax.kernels.residual.tpu import blocks

RULES = {
  'rdn': ('delta', True), 'rla': ('additive', True), 'gdn': ('delta', False),
  'gla': ('additive', False),
}  # fmt: skip


def calls(rules, sizes, dtypes, length: int) -> dict[str, Call]:
  """The configurations, by name: every rule, size and type; and what else selects code."""
  found = {}
  for rule, size, dtype in itertools.product(rules, sizes, dtypes):
    update, residual = RULES[rule]
    call = Call(update, residual, dtype=dtype, T=length, G=2, H=4, K=size, V=size)
    found[f'{rule} {size} {dtype}'] = call
  update, residual = RULES[rules[0]]
  one = functools.partial(
    Call, update, residual, dtype=dtypes[0], T=length, K=sizes[0], V=sizes[0]
  )
  name = f'{rules[0]} {sizes[0]} {dtypes[0]}'
  found[f'{name}, one document'] = one(segmented=False)
  found[f'{name}, one token'] = one(T=1, segmented=False)
  if residual:
    found[f'{name}, no clip'] = one(clip=None)
    found[f'{name}, plain sum'] = one(readout='sum')
  return found


def check(call: Call, seed: int, chunk_size: int, interpret: bool) -> dict[str, float]:
  """Errors of outputs and gradients by name, each as a share of its bar: over 1 is wrong."""
  inputs, segments, cotangents = judge.make_problem(call, seed)
  run = jax.jit(functools.partial(_run, call, chunk_size, interpret))
  return judge.shares(
    call.dtype, run(inputs, segments, cotangents),
    judge.reference(call, inputs, segments, cotangents),
  )  # fmt: skip


def _run(call, chunk_size, interpret, inputs, segments, cotangents):
  def kernels(x):
    out = tpu.residual_attention(
      *(x.get(name) for name in judge.INPUTS), segments, update=call.update, clip=call.clip,
      readout=call.readout, chunk_size=chunk_size, interpret=interpret,
    )  # fmt: skip
    return {name: y for name, y in zip(judge.OUTPUTS, out) if y is not None}

  values, transpose = jax.vjp(kernels, inputs)
  return values, transpose(cotangents)[0]


def check_step(call: Call, seed: int, interpret: bool) -> dict[str, float]:
  """The same for the decode step, which has no gradient: it computes in float32 throughout."""
  inputs, _, cotangents = judge.make_problem(call, seed)
  step = functools.partial(tpu.residual_attention_step, interpret=interpret)
  return judge.check_step(call, step, inputs, cotangents)


def check_sharded(seed: int, chunk_size: int, interpret: bool) -> dict[str, float]:
  """A call that is divided over all devices, against the same call on one of them."""
  devices = jax.device_count()
  call = Call(dtype='float32', T=64, B=devices, K=64, V=64)
  inputs, segments, cotangents = judge.make_problem(call, seed)
  run = functools.partial(_run, call, chunk_size, interpret)
  mesh = jax.make_mesh((devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.PartitionSpec('data')
  divided = jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=not interpret)
  together = jax.jit(divided)(inputs, segments, cotangents)
  alone = jax.jit(run)(inputs, segments, cotangents)
  return judge.shares('float32', together, alone)


def main(arguments=None) -> int:
  """Runs all checks; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--rules', nargs='+', default=list(RULES), choices=list(RULES))
  parser.add_argument('--sizes', type=int, nargs='+', default=[64, 100, 128, 256])
  parser.add_argument('--dtypes', nargs='+', default=list(tpu.DTYPES), choices=list(tpu.DTYPES))
  parser.add_argument('--chunks', type=int, nargs='+', default=list(blocks.CHUNKS))
  parser.add_argument('--length', type=int, default=600, help='tokens of a sequence')
  parser.add_argument('--interpret', action='store_true', help='no TPU: interpret the kernels')
  flags = parser.parse_args(arguments)
  device = jax.devices()[0]
  if device.platform != 'tpu' and not flags.interpret:
    print(f'the kernels need a TPU; the platform is {device.platform} (or use --interpret)')
    return 2
  where = 'interpreted' if flags.interpret else device.device_kind
  print(f'{where}, jax {jax.__version__}; errors as shares of their bars', flush=True)
  checks = {}
  for (name, call), chunk in itertools.product(
    calls(flags.rules, flags.sizes, flags.dtypes, flags.length).items(), flags.chunks
  ):
    run = functools.partial(check, call, chunk_size=chunk, interpret=flags.interpret)
    checks[f'{name}, chunk {chunk}'] = run
  for rule, size, dtype in itertools.product(flags.rules, flags.sizes, flags.dtypes):
    update, residual = RULES[rule]
    call = Call(update, residual, dtype=dtype, segmented=False, B=2, G=2, H=4, K=size, V=size)
    run = functools.partial(check_step, call, interpret=flags.interpret)
    checks[f'decode {rule} {size} {dtype}'] = run
  if jax.device_count() > 1:
    checks[f'on {jax.device_count()} devices'] = functools.partial(
      check_sharded, chunk_size=flags.chunks[0], interpret=flags.interpret
    )
  wrong, begin = 0, time.monotonic()
  for index, (name, run) in enumerate(checks.items(), 1):
    left = (time.monotonic() - begin) / max(index - 1, 1) * (len(checks) - index + 1)
    eta = f' ETA {left:.0f} s' if index > 1 else ''
    name = f'[{index}/{len(checks)}{eta}] {name}'
    try:
      wrong += not judge.report(name, run(seed=index))
    except Exception as error:  # whatever the compiler or the chip raises is a finding
      message = (str(error) or type(error).__name__).splitlines()[0][:200]
      print(f'WRONG {name}: {message}', flush=True)
      wrong += 1
  print(f'{len(checks) - wrong} of {len(checks)} checks are right')
  if wrong:
    print('Do not train with implementation="pallas" here; implementation="chunked" does without.')
  return 1 if wrong else 0


if __name__ == '__main__':
  sys.exit(main())
