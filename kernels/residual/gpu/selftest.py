"""Checks the Triton kernels on the card at hand: `python -m rla_jax.kernels.residual.gpu.selftest`.

Compilers have computed wrong gradients on some cards without a word. So every configuration in use,
those of the heuristic and those of this card's tuned table, runs forward and backward on small
problems, and values and gradients are held against the recurrence in float64, token by token. The
decode step and the layers' short convolution likewise; on several GPUs also that a sharded call
gathers nothing.

Prints a table; exits with 1 and names the Triton version if anything is wrong.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import triton

from rla_jax.kernels.residual.gpu import blocks, call, candidates, step
from rla_jax.kernels.short_conv.gpu import selftest as short_conv

CLIP = 1.0
NAMES = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma', 'base', 'residual')
GATES = ('log_decay', 'beta', 'gamma')
# RMS(error) / RMS(reference): values, gradients of tensors, gradients of gates.
BARS = {'float32': (2e-5, 2e-5, 2e-5), 'bfloat16': (0.005, 0.008, 0.02)}
BARS['float16'] = BARS['bfloat16']


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

  def __str__(self):
    rule = ('delta' if self.delta else 'additive') + (' residual' if self.residual else '')
    return f'{rule:18} {self.dtype:8} K {self.key_dim:3} V {self.value_dim:3} {self.source}'


def with_split(chosen: blocks.Blocks, *, delta, value_dim, heads, length) -> blocks.Blocks:
  """The record with what `sequence_split` says written out, if it splits the sequence."""
  programs, spans = heads * -(-value_dim // chosen.forward.value), length // chosen.chunk
  split = blocks.sequence_split(programs, spans // chosen.span, delta=delta)
  return dataclasses.replace(chosen, split=split) if split > 1 else chosen


def shortened(chosen: blocks.Blocks) -> blocks.Blocks:
  """The record for a sequence of four spans, where all its kernels still run."""
  is_split = chosen.split is not None and chosen.split > 1
  return dataclasses.replace(chosen, split=4, pieces=1) if is_split else chosen


def lengths(chosen: blocks.Blocks) -> tuple[int, int]:
  """Lengths of a check: whole chunks, and a ragged end."""
  tokens = 4 * chosen.chunk * chosen.span
  return tokens, tokens - 3


def heuristic_cases(sizes, dtypes) -> list[Case]:
  """The heuristic's answers over short and long, few and many sequences, each once.

  Where it splits a long sequence, a short one is split here.
  """
  cases = {}
  for size, dtype, delta, residual, heads, length in itertools.product(
    sizes, dtypes, (True, False), (True, False), (2, 64, 256), (256, 32768)
  ):
    sizes_ = {'key_dim': size, 'value_dim': size, 'dtype': dtype}
    chosen = blocks.heuristic(
      delta=delta, residual=residual, heads=heads, length=length, **sizes_
    )
    chosen = shortened(
      with_split(chosen, delta=delta, value_dim=size, heads=heads, length=length)
    )
    case = Case(delta, residual, dtype, size, size, chosen, f'heuristic heads {heads}')
    cases.setdefault(case, case)
  return list(cases)


def tuned_cases(device_kind: str) -> list[Case]:
  """Every entry of the card's tuned table."""
  cases = {}
  for key, record in blocks.tuned_table(device_kind).items():
    rule, dtype, K, V, *rest = key.split('/')
    key_dim, value_dim = (int(re.sub(r'\D', '', x)) for x in (K, V))
    chosen = shortened(blocks.Blocks.from_json(record))
    delta, residual = rule.startswith('delta'), rule.endswith('residual')
    case = Case(delta, residual, dtype, key_dim, value_dim, chosen, 'tuned ' + ' '.join(rest))
    cases.setdefault(case, case)
  return list(cases)


def candidate_cases(sizes, dtypes) -> list[Case]:
  """The heuristic's answers, and for many sequences each launch that tuning tries first."""
  heuristic = heuristic_cases(sizes, dtypes)
  cases = {case: case for case in heuristic}
  bases = {(c.delta, c.residual, c.dtype, c.key_dim): c for c in heuristic if not c.blocks.split}
  for base in bases.values():
    for part in candidates.PROMISING:
      for chosen in candidates.candidates(base.blocks, part, base.value_dim):
        launch = dataclasses.astuple(getattr(chosen, part))
        case = dataclasses.replace(base, blocks=chosen, source=f'{part} {launch}')
        cases.setdefault(case, case)
  return list(cases)


def make_problem(case: Case, length: int, seed: int, *, B=1, G=1, H=2):
  """Inputs whose every |v - S^T k| is clear of the clip's bound, and cotangents."""
  rng = np.random.default_rng(seed)
  K, V = case.key_dim, case.value_dim
  dtype = jnp.dtype(case.dtype)
  q, k = rng.standard_normal((2, B, length, G, K))
  k += 2 * rng.standard_normal((B, 1, G, K))  # alike: what an inverse in low precision breaks on
  q, k = ((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype) for x in (q, k))
  log_decay = -rng.exponential(0.05, (B, length, H))
  log_decay[:, length // 2] = -np.inf  # a full reset
  beta, gamma = rng.uniform(0, 1, (2, B, length, H))
  base, residual = 0.1 * rng.standard_normal((2, B, H, K, V))
  v = rng.standard_normal((B, length, H, V))
  gates = [x.astype(np.float32) for x in (log_decay, beta, gamma, base, residual)]
  inputs = [q, k, v, *gates] if case.residual else [q, k, v, *gates[:2], None, gates[3], None]
  if case.residual:
    inputs[2] = _clear_of_bound(inputs, case.delta)
  inputs[2] = np.asarray(inputs[2]).astype(dtype)
  outputs = [(v.shape, dtype), (base.shape, np.float32), (base.shape, np.float32)]
  cotangents = [rng.standard_normal(shape).astype(d) for shape, d in outputs]
  return inputs, cotangents if case.residual else [*cotangents[:2], None]


def _clear_of_bound(inputs, delta):
  """Moves values away from where the clip's gradient jumps, which rounding would decide."""
  q, k, v, log_decay, beta, gamma, base, residual = _wide(inputs)

  def body(states, token):
    q, k, v, *gates = token
    keys = jnp.repeat(k, v.shape[1] // k.shape[1], axis=1)
    prediction = jnp.einsum('bhkv,bhk->bhv', states[0], keys)
    error = v - prediction
    is_near = jnp.abs(jnp.abs(error) - CLIP) < 0.06
    v = jnp.where(is_near, prediction + jnp.sign(error) * (CLIP - 0.12), v)
    _, *states = _token(states, (q, k, v, *gates), delta)
    return tuple(states), v

  with _reference_mode():
    tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_decay, beta, gamma)]
    return np.moveaxis(np.asarray(jax.lax.scan(body, (base, residual), tokens)[1]), 0, 1)


def _reference_mode():
  return jax.enable_x64(True)


def _wide(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _token(states, token, delta):
  update = 'delta' if delta else 'additive'
  return step.plain_step(*token, *states, update=update, clip=CLIP, readout='gated')


@functools.partial(jax.jit, static_argnums=2)
def _reference(inputs, cotangents, delta):
  def run(inputs):
    *tokens, base, residual = inputs

    def body(states, token):
      o, *states = _token(states, token, delta)
      return tuple(states), o

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    states, o = jax.lax.scan(body, (base, residual), tokens)
    return [jnp.moveaxis(o, 0, 1), *states]

  values, pullback = jax.vjp(run, inputs)
  return values, pullback(cotangents)[0]


def check(case: Case, *, length: int, seed: int = 0, interpret: bool = False) -> dict[str, float]:
  """Errors of values and gradients by name, each as a share of its bar: over 1 is wrong."""
  inputs, cotangents = make_problem(case, length, seed)
  config = call.Config(case.delta, case.residual, CLIP, case.blocks, interpret)

  @jax.jit
  def run(inputs, cotangents):
    values, pullback = jax.vjp(lambda inputs: list(call.attend(config, *inputs, None)), inputs)
    return values, pullback(cotangents)[0]

  actual = run(inputs, cotangents)
  with _reference_mode(), jax.default_device(jax.devices('cpu')[0]):
    wanted = _reference(_wide(inputs), _wide(cotangents), case.delta)
  values, tensors, gates = BARS[case.dtype]
  bars = {'o': values, 'base': values, 'residual': values}
  bars |= {f'd{n}': gates if n in GATES else tensors for n in NAMES}
  shares = {}
  for name, x, y in zip(bars, (*actual[0], *actual[1]), (*wanted[0], *wanted[1]), strict=True):
    if y is not None:
      shares[name] = _error(x, y) / bars[name]
  return shares


def _error(x, y) -> float:
  x, y = (np.asarray(z, np.float64) for z in (x, y))
  error = np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))
  return float(error) if np.isfinite(error) else float('inf')


def check_step(dtype: str, size: int, *, interpret: bool = False) -> dict[str, float]:
  """The same for the decode step."""
  shares = {}
  for delta, residual in itertools.product((True, False), (True, False)):
    case = Case(delta, residual, dtype, size, size, None, 'decode')
    (*tokens, base, state), _ = make_problem(case, 1, 3, B=3, G=2, H=4)
    tokens = [None if x is None else x[:, 0] for x in tokens]
    options = {'update': 'delta' if delta else 'additive', 'clip': CLIP, 'readout': 'gated'}
    run = functools.partial(step.residual_attention_step, **options, interpret=interpret)
    actual = jax.jit(run)(*tokens, base, state)
    with _reference_mode(), jax.default_device(jax.devices('cpu')[0]):
      wanted = step.plain_step(*_wide(tokens), *_wide((base, state)), **options)
    for name, x, y in zip(('o', 'base', 'residual'), actual, wanted, strict=True):
      if y is not None:
        bar = BARS[dtype][0] if name == 'o' else BARS['float32'][0]
        shares[name] = max(shares.get(name, 0.0), _error(x, y) / bar)
  return shares


def check_short_conv(case: short_conv.Case, *, interpret: bool = False) -> dict[str, float]:
  """The same for the short convolution."""
  values, tensors, _ = BARS[case.dtype]
  # Sums over all tokens are float32 whatever the inputs are.
  bars = {'y': values, 'dh': tensors, 'dtail': tensors, 'dtaps': BARS['float32'][1]}
  errors = short_conv.check(case, interpret=interpret)
  return {name: error / bars[name] for name, error in errors.items()}


def check_sharded() -> str | None:
  """What is wrong with a call that is sharded over all devices, or None."""
  devices = jax.device_count()
  mesh = jax.make_mesh((devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  chosen = blocks.heuristic(
    delta=True, residual=True, key_dim=64, value_dim=64, dtype='bfloat16', heads=8, length=256
  )
  case = Case(True, True, 'bfloat16', 64, 64, chosen, 'sharded')
  inputs, cotangents = make_problem(case, 128, 5, B=2 * devices)
  config = call.Config(True, True, CLIP, chosen, False)

  def both(inputs, cotangents):
    values, pullback = jax.vjp(lambda inputs: list(call.attend(config, *inputs, None)), inputs)
    return values, pullback(cotangents)[0]

  alone = jax.jit(both)(inputs, cotangents)
  compiled = jax.jit(both).lower(*jax.device_put((inputs, cotangents), sharding)).compile()
  if 'all-gather' in compiled.as_text():
    return 'the compiled program gathers its inputs'
  together = compiled(*jax.device_put((inputs, cotangents), sharding))
  errors = [_error(x, y) for x, y in zip(*map(jax.tree.leaves, (together, alone)), strict=True)]
  return None if max(errors) < 1e-6 else f'differs from one device by {max(errors):.1e}'


def report(name: str, shares: dict[str, float]) -> bool:
  """Prints a line; returns whether all is well."""
  worst = max(shares, key=shares.get)
  is_right = shares[worst] <= 1
  detail = ' '.join(f'{n} {s:.2f}' for n, s in shares.items() if s > 1)
  verdict = 'ok   ' if is_right else 'WRONG'
  print(f'{verdict} {name}: worst {worst} at {shares[worst]:.2f} of its bar {detail}', flush=True)
  return is_right


def main() -> int:
  """Runs all checks; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--sizes', type=int, nargs='+', default=[64, 100, 128, 256])
  parser.add_argument('--dtypes', nargs='+', default=list(BARS), choices=list(BARS))
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
  cases += find(arguments.sizes, arguments.dtypes)
  runs = [(case, length) for case in cases for length in lengths(case.blocks)]
  convolutions = short_conv.cases(arguments.sizes, arguments.dtypes)
  wrong = 0
  with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
    futures = [
      pool.submit(check, case, length=length, seed=seed)
      for seed, (case, length) in enumerate(runs)
    ]
    names = [f'{case} length {length}' for case, length in runs] + list(map(str, convolutions))
    futures += [pool.submit(check_short_conv, case) for case in convolutions]
    for index, (name, future) in enumerate(zip(names, futures, strict=True), 1):
      name = f'[{index}/{len(names)}] {name}'
      try:
        wrong += not report(name, future.result())
      except Exception as error:  # whatever the compiler or the driver raises is a finding
        message = (str(error) or type(error).__name__).splitlines()[0][:200]
        print(f'WRONG {name}: {message}', flush=True)
        wrong += 1
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
