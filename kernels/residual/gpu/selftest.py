"""Checks the Triton kernels on the card at hand: `python -m rla_jax.kernels.residual.gpu.selftest`.

Compilers have computed wrong gradients on some cards without a word. So every configuration in use,
those of the heuristic and those of this card's tuned table, runs forward and backward on small
problems, and values and gradients are held against the recurrence in float64, token by token. The
decode step and the layers' short convolution likewise; on several GPUs also that a sharded call
gathers nothing.

Prints a table; exits with 1 and names the Triton version if anything is wrong, and with 2 where
Triton or the GPU is missing.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import sys

import jax
import numpy as np

try:
  import triton
except ModuleNotFoundError as error:
  message = "triton is not installed: pip install -e '.[cuda]'"
  if __name__ == '__main__':
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)
  raise ModuleNotFoundError(message) from error

from rla_jax.kernels.residual import judge
from rla_jax.kernels.residual.gpu import blocks, call, candidates, step
from rla_jax.kernels.residual.gpu.handover import HANDED_AT_A_TIME
from rla_jax.kernels.residual.gpu.launch import is_hopper
from rla_jax.kernels.residual.judge import report
from rla_jax.kernels.short_conv.gpu import selftest as short_conv


@dataclasses.dataclass(frozen=True)
class Case:
  """One configuration: which kernels are compiled, and with which block sizes."""

  delta: bool
  residual: bool
  dtype: str
  key_dim: int
  value_dim: int
  blocks: blocks.Blocks
  source: str = dataclasses.field(compare=False)
  is_tried: bool = dataclasses.field(default=False, compare=False)  # by tuning, and not in use

  @property
  def update(self) -> str:
    """The rule's name."""
    return 'delta' if self.delta else 'additive'

  def __str__(self):
    rule = self.update + (' residual' if self.residual else '')
    return f'{rule:18} {self.dtype:8} K {self.key_dim:3} V {self.value_dim:3} {self.source}'


def parts(chosen: blocks.Blocks, *, value_dim, heads, length) -> tuple[int, int]:
  """Into how many a call splits its sequences in the forward pass, and pieces in the backward."""
  spans = -(-length // (chosen.chunk * chosen.span))
  call_ = {'value_dim': value_dim, 'heads': heads}
  piece = -(-spans // chosen.pieces)
  return (
    blocks.parts(chosen, blocks.split_launch(chosen), spans=spans, **call_),
    blocks.parts(chosen, chosen.sweep, spans=piece, **call_),
  )


def settled(chosen: blocks.Blocks, *, value_dim, heads, length) -> blocks.Blocks:
  """The record with what a call decides by its heads written out: parts, if any, and pairs."""
  split, back = parts(chosen, value_dim=value_dim, heads=heads, length=length)
  walk = blocks.walk_of(chosen, value_dim=value_dim, heads=heads, split=split)
  split = max(split, back)
  return dataclasses.replace(
    chosen, fill=0, split=split if split > 1 else None, apart=False, walk=walk,
    pair=None if walk == 'both' else chosen.pair,
  )  # fmt: skip


def shortened(chosen: blocks.Blocks) -> blocks.Blocks:
  """The record for a sequence of four spans, where all its kernels still run."""
  is_split = chosen.split is not None and chosen.split > 1
  return dataclasses.replace(chosen, split=4, pieces=1) if is_split else chosen


def lengths(chosen: blocks.Blocks) -> tuple[int, int]:
  """Lengths of a check: whole chunks, and a ragged end. Pairs hand over more than twice."""
  spans = 4 + 2 * HANDED_AT_A_TIME // chosen.span * (chosen.walk == 'pair')
  tokens = spans * chosen.chunk * chosen.span
  return tokens, tokens - 3


def heuristic_cases(sizes, dtypes, *, hopper: bool = True) -> list[Case]:
  """The heuristic's answers over short and long, few and many sequences, each once.

  Where it splits a long sequence, a short one is split here.
  """
  cases = {}
  for size, dtype, delta, residual, heads, length in itertools.product(
    sizes, dtypes, (True, False), (True, False), (2, 32, 64, 128, 256), (256, 32768)
  ):
    sizes_ = {'key_dim': size, 'value_dim': size, 'dtype': dtype}
    chosen = blocks.heuristic(
      delta=delta, residual=residual, heads=heads, length=length, hopper=hopper, **sizes_
    )
    chosen = settled(chosen, value_dim=size, heads=heads, length=length)
    chosen = shortened(chosen)
    case = Case(delta, residual, dtype, size, size, chosen, f'heuristic heads {heads}')
    cases.setdefault(case, case)
  return list(cases)


def tuned_cases(device_kind: str) -> list[Case]:
  """Every entry of the card's tuned table."""
  cases = {}
  for key, record in blocks.tuned_table(device_kind).items():
    asked = blocks.parsed_key(key)
    dtype, key_dim = asked.pop('dtype'), asked.pop('key_dim')
    delta, residual = asked.pop('delta'), asked.pop('residual')
    chosen = shortened(settled(blocks.Blocks.from_json(record), **asked))
    source = f'tuned heads {asked["heads"]} length {asked["length"]}'
    case = Case(delta, residual, dtype, key_dim, asked['value_dim'], chosen, source)
    cases.setdefault(case, case)
  return list(cases)


def candidate_cases(sizes, dtypes, *, hopper: bool = True) -> list[Case]:
  """The heuristic's answers, and for many sequences each launch that tuning tries first."""
  heuristic = heuristic_cases(sizes, dtypes, hopper=hopper)
  cases = {case: case for case in heuristic}
  bases = {
    (c.delta, c.residual, c.dtype, c.key_dim, c.blocks.walk): c
    for c in heuristic if not c.blocks.split
  }  # fmt: skip
  seen = set()
  for (*call_, walk), base in sorted(bases.items(), key=lambda item: item[0][-1] != 'both'):
    # Walks differ in their own kernel alone, and `forward` is that of walks of both states.
    varied = ('pair',) if tuple(call_) in seen else candidates.PROMISING
    seen.add(tuple(call_))
    for part in varied:
      if part == 'forward' and walk != 'both':
        continue
      for chosen in candidates.candidates(base.blocks, part, base.value_dim):
        if getattr(chosen, part) is None:
          continue
        launch = dataclasses.astuple(getattr(chosen, part))
        source = f'{part} {launch}'
        case = dataclasses.replace(base, blocks=chosen, source=source, is_tried=True)
        cases.setdefault(case, case)
  return list(cases)


def make_problem(case: Case, length: int, seed: int, *, B=1, G=1, H=2):
  """A call, and its inputs and cotangents by name."""
  rng = np.random.default_rng(seed)
  K, V = case.key_dim, case.value_dim
  q, k = rng.standard_normal((2, B, length, G, K))
  k += 2 * rng.standard_normal((B, 1, G, K))  # alike: what an inverse in low precision breaks on
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  log_decay = -rng.exponential(0.05, (B, length, H))
  log_decay[:, length // 2] = -np.inf  # a full reset
  beta, gamma = rng.uniform(0, 1, (2, B, length, H))
  base, residual = 0.1 * rng.standard_normal((2, B, H, K, V))
  v = rng.standard_normal((B, length, H, V))
  problem = judge.Call(
    case.update, case.residual, dtype=case.dtype, segmented=False, B=B, T=length, G=G, H=H, K=K, V=V
  )
  drawn = (q, k, v, log_decay, beta, gamma, base, residual)
  return problem, *judge.prepared(problem, drawn, None, rng)


def _run(config, inputs, cotangents):
  """(outputs, gradients) of the kernels by name."""

  def kernels(x):
    out = call.attend(config, *(x.get(name) for name in judge.INPUTS), None)
    return {name: y for name, y in zip(judge.OUTPUTS, out) if y is not None}

  values, transpose = jax.vjp(kernels, inputs)
  return values, transpose(cotangents)[0]


def check(case: Case, *, length: int, seed: int = 0, interpret: bool = False) -> dict[str, float]:
  """Errors of values and gradients by name, each as a share of its bar: over 1 is wrong."""
  problem, inputs, cotangents = make_problem(case, length, seed)
  config = call.Config(case.delta, case.residual, problem.clip, case.blocks, interpret)
  found = jax.jit(functools.partial(_run, config))(inputs, cotangents)
  return judge.shares(case.dtype, found, judge.reference(problem, inputs, None, cotangents))


def check_step(dtype: str, size: int, *, interpret: bool = False) -> dict[str, float]:
  """The same for the decode step."""
  shares = {}
  for delta, residual in itertools.product((True, False), (True, False)):
    case = Case(delta, residual, dtype, size, size, None, 'decode')
    problem, inputs, cotangents = make_problem(case, 1, 3, B=3, G=2, H=4)
    run = functools.partial(step.residual_attention_step, interpret=interpret)
    found = judge.check_step(problem, run, inputs, cotangents)
    shares |= {name: max(share, shares.get(name, 0.0)) for name, share in found.items()}
  return shares


def check_short_conv(case: short_conv.Case, *, interpret: bool = False) -> dict[str, float]:
  """The same for the short convolution."""
  values, tensors, _ = judge.BARS[case.dtype]
  # Sums over all tokens are float32 whatever the inputs are.
  bars = {'y': values, 'dh': tensors, 'dtail': tensors, 'dtaps': judge.BARS['float32'][1]}
  errors = short_conv.check(case, interpret=interpret)
  return {name: error / bars[name] for name, error in errors.items()}


def check_sharded() -> str | None:
  """What is wrong with a call that is sharded over all devices, or None."""
  devices = jax.device_count()
  mesh = jax.make_mesh((devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  chosen = blocks.heuristic(
    delta=True, residual=True, key_dim=64, value_dim=64, dtype='bfloat16', heads=8, length=256,
    hopper=is_hopper(),
  )  # fmt: skip
  case = Case(True, True, 'bfloat16', 64, 64, chosen, 'sharded')
  problem, *arrays = make_problem(case, 128, 5, B=2 * devices)
  run = jax.jit(functools.partial(_run, call.Config(True, True, problem.clip, chosen, False)))
  alone = run(*arrays)
  arrays = jax.device_put(arrays, sharding)
  compiled = run.lower(*arrays).compile()
  if 'all-gather' in compiled.as_text():
    return 'the compiled program gathers its inputs'
  pairs = zip(*map(jax.tree.leaves, (compiled(*arrays), alone)), strict=True)
  worst = max(judge.error(x, y) for x, y in pairs)
  return None if worst < 1e-6 else f'differs from one device by {worst:.1e}'


def finding(error: Exception, *, is_tried: bool) -> tuple[str, bool]:
  """What to print of an error, and whether it is wrong: what is merely tried need not fit."""
  message = (str(error) or type(error).__name__).splitlines()[0][:200]
  is_wrong = not (is_tried and 'Shared memory requested' in message)
  return message, is_wrong


def main() -> int:
  """Runs all checks; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--sizes', type=int, nargs='+', default=[64, 100, 128, 256])
  parser.add_argument('--dtypes', nargs='+', default=list(judge.BARS), choices=list(judge.BARS))
  parser.add_argument('--workers', type=int, default=8, help='compilations at a time')
  parser.add_argument(
    '--candidates', action='store_true', help='also what tune_kernels.py would try: minutes'
  )
  arguments = parser.parse_args()
  device = jax.devices()[0]
  if device.platform not in ('gpu', 'cuda'):
    print(f'the kernels need an NVIDIA GPU; the platform is {device.platform}')
    return 2
  print(f'{device.device_kind}, Triton {triton.__version__}, jax {jax.__version__}')
  cases = [c for c in tuned_cases(device.device_kind) if c.dtype in arguments.dtypes]
  find = candidate_cases if arguments.candidates else heuristic_cases
  cases += find(arguments.sizes, arguments.dtypes, hopper=is_hopper())
  runs = [(case, length) for case in cases for length in lengths(case.blocks)]
  convolutions = short_conv.cases(arguments.sizes, arguments.dtypes)
  wrong = 0
  with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
    futures = [
      pool.submit(check, case, length=length, seed=seed)
      for seed, (case, length) in enumerate(runs)
    ]
    names = [f'{case} length {length}' for case, length in runs] + list(map(str, convolutions))
    tried = [case.is_tried for case, _ in runs] + [False] * len(convolutions)
    futures += [pool.submit(check_short_conv, case) for case in convolutions]
    found = zip(names, futures, tried, strict=True)
    for index, (name, future, is_tried) in enumerate(found, 1):
      name = f'[{index}/{len(names)}] {name}'
      try:
        wrong += not report(name, future.result())
      except Exception as error:  # whatever the compiler or the driver raises is a finding
        message, is_wrong = finding(error, is_tried=is_tried)
        print(f'{"WRONG" if is_wrong else "skip "} {name}: {message}', flush=True)
        wrong += is_wrong
  for dtype, size in itertools.product(arguments.dtypes, arguments.sizes):
    wrong += not report(f'decode {dtype} {size}', check_step(dtype, size))
  if jax.device_count() > 1:
    problem = check_sharded()
    print('ok    sharded' if problem is None else f'WRONG sharded: {problem}')
    wrong += problem is not None
  if wrong:
    print(
      f'{wrong} checks are wrong with Triton {triton.__version__} on {device.device_kind}: do not '
      'train with implementation="triton" here. Another Triton version may compile the kernels '
      'right; implementation="chunked" does not need Triton.'
    )
  return 1 if wrong else 0


if __name__ == '__main__':
  sys.exit(main())
