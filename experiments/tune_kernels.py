"""Tunes the block sizes of the Triton kernels on the card at hand and writes its table.

    python experiments/tune_kernels.py                                       # the usual sizes
    python experiments/tune_kernels.py --rules=delta_residual --lengths=2048 # one of them, minutes

For every problem, one part of the record after the other is varied (the chunk, then each kernel's
tile, warps and pipeline, then the pieces of the backward pass), starting from the heuristic, and
the fastest forward with backward is kept. Only configurations that pass the self-test enter the
table, so a configuration that this compiler gets wrong does not. Times are taken as in
benchmark_ops.py.

Writes kernels/residual/gpu/tuned/CARD.json, which the kernels read; other entries of the file stay.
Compiled kernels are kept in --cache, so that a second run does not compile again.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
from absl import app, flags
from ops_benchmark import timing
from ops_benchmark.problem import Problem, on_device
from tqdm import tqdm

from rla_jax.kernels.residual.gpu import blocks, call, selftest

LIST = flags.DEFINE_list
RULES = LIST(
  'rules',
  ['delta_residual', 'additive_residual', 'delta', 'additive'],
  'delta_residual (RDN), additive_residual (RLA), delta (GDN), additive (simple GLA)',
)
LENGTHS = LIST('lengths', ['2048', '8192', '32768'], 'tokens of a sequence')
SIZES = LIST('sizes', ['64', '128', '256'], 'key and value sizes of a head')
TOKENS = flags.DEFINE_integer('tokens', 32768, 'tokens in all')
WIDTH = flags.DEFINE_integer('width', 2048, 'heads times head size')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float16', 'float32'], 'of q, k, v')
MEMORY = flags.DEFINE_float('memory', 2.0, 'most peak memory, over q, k, v, o and their gradients')
PARTS = LIST(
  'parts', ['chunk', 'forward', 'sweep', 'gradients', 'prepare', 'pieces'], 'what to vary, in order'
)
WORKERS = flags.DEFINE_integer('workers', 8, 'compilations at a time')
CACHE = flags.DEFINE_string('cache', '~/.cache/rla_jax', 'folder of the compilation cache')
OUT = flags.DEFINE_string('out', None, "file of the table; the package's own if not given")


def variants(current: blocks.Blocks, part: str, value_dim: int) -> list[blocks.Blocks]:
  """Records that differ from `current` in one part; `current` is the first."""
  change = dataclasses.replace
  if part == 'chunk':
    sizes = itertools.product((16, 32, 64), (1, 2, 4))
    found = [change(current, chunk=c, span=s) for c, s in sizes if c * s <= 128]
  elif part == 'pieces':
    found = [change(current, pieces=p) for p in (1, 2, 4, 8, 16)]
  else:
    widest = max(16, 1 << (value_dim - 1).bit_length())
    tiles = [t for t in (16, 32, 64, 128) if t <= widest] if part != 'prepare' else [0]
    # One stage is left out: Triton 3.6 has read invalid shared memory there on Hopper.
    shapes = itertools.product(tiles, (1, 2, 4, 8), (2, 3) if part != 'prepare' else (1, 2))
    found = [change(current, **{part: blocks.Kernel(*shape)}) for shape in shapes]
  return [current, *(f for f in found if f != current)]


def build(problem: Problem, chosen: blocks.Blocks, inputs: tuple):
  """Forward with backward, compiled."""
  config = call.Config(problem.is_delta, problem.has_residual, 1.0, chosen, False)

  def both(do, *inputs):
    outputs, pullback = jax.vjp(lambda *x: call.attend(config, *x, None), *inputs)
    dstates = jax.tree.map(jnp.zeros_like, outputs[1:])
    return outputs, pullback((do, *dstates))

  return timing.prepare(both, (inputs[2], *inputs))


def is_right(problem: Problem, chosen: blocks.Blocks) -> bool:
  """The self-test's verdict, over whole chunks and a ragged end."""
  sizes = (problem.dtype, problem.size, problem.size)
  case = selftest.Case(problem.is_delta, problem.has_residual, *sizes, chosen, 'tuning')
  tokens = 2 * chosen.chunk * chosen.span
  for length in (tokens, tokens + 13):
    shares = selftest.check(case, length=length, seed=length)
    if max(shares.values()) > 1:
      return False
  return True


def fastest(problem: Problem, candidates: list[blocks.Blocks], inputs: tuple, progress):
  """The fastest right candidate with its seconds, and how many fell out for which reason."""
  fallen: collections.Counter = collections.Counter()
  times = []
  limit = MEMORY.value * 8 * problem.qkvo_bytes
  with concurrent.futures.ThreadPoolExecutor(WORKERS.value) as pool:
    compiling = [(c, pool.submit(build, problem, c, inputs)) for c in candidates]
    for candidate, future in compiling:
      progress.update()
      try:
        prepared = future.result()
        if timing.peak_bytes(prepared.once) > limit and candidate is not candidates[0]:
          fallen['over the memory limit'] += 1
          continue
        seconds = timing.measure(prepared, (inputs[2], *inputs), repeats=3).seconds
        times.append((seconds, len(times), candidate))
      except Exception as error:  # a tile may be too large for the compiler or the card
        fallen[type(error).__name__] += 1
  for seconds, _, candidate in sorted(times):
    if is_right(problem, candidate):
      return candidate, seconds, fallen
    fallen['WRONG RESULTS'] += 1
    tqdm.write(f'wrong results on this card: {candidate}')
  return None, float('inf'), fallen


def tune(problem: Problem) -> dict | None:
  """Entry of the table for a problem, by its key, or None if nothing is right."""
  sizes = {'key_dim': problem.size, 'value_dim': problem.size, 'dtype': problem.dtype}
  sizes |= {'delta': problem.is_delta, 'residual': problem.has_residual}
  sizes |= {'heads': problem.batch * problem.heads, 'length': problem.length}
  arrays = on_device(problem, 0)
  state = jnp.zeros((problem.batch, problem.heads, problem.size, problem.size))
  inputs = tuple(arrays[n] for n in ('q', 'k', 'v', 'log_decay', 'beta'))
  inputs += (arrays['gamma'], state, state) if problem.has_residual else (None, state, None)
  best = blocks.heuristic(**sizes)
  key = blocks.tuned_key(**sizes)
  total = sum(len(variants(best, part, problem.size)) for part in PARTS.value)
  with tqdm(total=total, desc=key) as progress:
    for part in PARTS.value:
      candidates = variants(best, part, problem.size)
      found, seconds, fallen = fastest(problem, candidates, inputs, progress)
      if found is None:
        tqdm.write(f'{key}: nothing is right; no entry')
        return None
      best = found
      reasons = ', '.join(f'{n} {r}' for r, n in fallen.items()) or 'none'
      tqdm.write(f'{part}: {seconds * 1e3:.3f} ms; fell out: {reasons}')
  return {key: dataclasses.asdict(best)}


def main(argv):
  """Tunes every problem asked for, and writes the table after each."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(CACHE.value).expanduser()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  device = jax.devices()[0]
  if device.platform not in ('gpu', 'cuda'):
    raise app.UsageError(f'tuning needs an NVIDIA GPU; the platform is {device.platform}')
  path = pathlib.Path(OUT.value) if OUT.value else blocks.table_path(device.device_kind)
  names = {
    'delta_residual': 'rdn', 'additive_residual': 'rla', 'delta': 'gdn', 'additive': 'simple_gla'
  }  # fmt: skip
  for rule, size, length in itertools.product(
    RULES.value, map(int, SIZES.value), map(int, LENGTHS.value)
  ):
    batch, heads = max(1, TOKENS.value // length), WIDTH.value // size
    operation = names[rule]
    entry = tune(
      Problem(operation, 'forward_backward', batch, length, heads, size, DTYPE.value)
    )
    if entry is not None:
      table = json.loads(path.read_text()) if path.exists() else {}
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(table | entry, indent=1, sort_keys=True) + '\n')
  print(f'wrote {path}')


if __name__ == '__main__':
  app.run(main)
