"""Tunes the block sizes of the Triton kernels on the card at hand and writes its table.

    python experiments/tune_kernels.py                                       # the usual sizes
    python experiments/tune_kernels.py --rules=delta_residual --lengths=2048 # one of them, minutes
    python experiments/tune_kernels.py --seconds=500                         # then again: goes on

For every problem, one part of the record after the other is varied (each kernel's tile, warps and
pipeline, whether programs walk in pairs, the parts and pieces of a sequence), starting from the
heuristic, and the fastest forward with backward is kept, if it gains enough (--margin) and takes no
more memory (--memory). Values and gradients of a candidate are checked as in the self-test before
it is chosen, so a configuration that this compiler gets wrong does not enter the table. Times are
taken as in benchmark_ops.py, with nothing compiled meanwhile.

Writes kernels/residual/gpu/tuned/CARD.json, which the kernels read, after every part: what differs
from the heuristic's answer; entries of other problems stay. What was measured goes to a log beside
it as it comes, CARD.jsonl, or to --log: a run that is stopped goes on from there, as long as the
kernels, Triton and JAX are the same. Delete it to measure afresh. Compiled kernels are kept in
--cache.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import triton
from absl import app, flags
from ops_benchmark import timing
from ops_benchmark.problem import Problem, on_device
from tqdm import tqdm

from rla_jax.kernels.residual.gpu import blocks, call, selftest
from rla_jax.kernels.residual.gpu import candidates as candidate_lists
from rla_jax.kernels.residual.gpu.launch import is_hopper

LIST = flags.DEFINE_list
RULES = LIST(
  'rules',
  ['delta_residual', 'additive_residual', 'delta', 'additive'],
  'delta_residual (RDN), additive_residual (RLA), delta (GDN), additive (simple GLA)',
)
LENGTHS = LIST('lengths', ['2048', '8192', '32768'], 'tokens of a sequence')
SIZES = LIST('sizes', ['128', '64', '256'], 'key and value sizes of a head')
TOKENS = flags.DEFINE_integer('tokens', 32768, 'tokens in all')
WIDTH = flags.DEFINE_integer('width', 2048, 'heads times head size')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float16', 'float32'], 'of q, k, v')
MEMORY = flags.DEFINE_float('memory', 1.0, "most peak memory, over that of the heuristic's launch")
PARTS = LIST(
  'parts', ['keys', 'queries', 'forward', 'pair', 'sweep', 'prepare', 'fill', 'pieces'],
  f'what to vary, in order, of {", ".join(candidate_lists.PARTS)}',
)  # fmt: skip
MARGIN = flags.DEFINE_float('margin', 0.02, 'share of the time in use that another has to gain')
THOROUGH = flags.DEFINE_bool('thorough', False, 'try every launch, not the promising ones alone')
SECONDS = flags.DEFINE_float('seconds', None, 'begin no part of a record after so long')
WORKERS = flags.DEFINE_integer('workers', 8, 'compilations at a time')
CACHE = flags.DEFINE_string('cache', '~/.cache/rla_jax', 'folder of the compilation cache')
OUT = flags.DEFINE_string('out', None, "file of the table; the package's own if not given")
LOG = flags.DEFINE_string('log', None, "file of the log; the table's with .jsonl if not given")

OPERATIONS = {
  'delta_residual': 'rdn', 'additive_residual': 'rla', 'delta': 'gdn', 'additive': 'simple_gla'
}  # fmt: skip


class Log:
  """What was found of each candidate: a line of JSON as it comes, and those of earlier runs."""

  def __init__(self, path: pathlib.Path, versions: str):
    self.path, self.versions = path, versions
    self._found: dict[tuple[str, str], dict] = {}
    if path.exists():
      for line in path.read_text().splitlines():
        entry = json.loads(line)
        if entry['versions'] == versions:
          self._found[self._name(entry['key'], entry['blocks'])] = entry
    path.parent.mkdir(parents=True, exist_ok=True)

  def get(self, key: str, chosen: blocks.Blocks) -> dict:
    """What is known of a candidate: milliseconds or error, and right, where they are known."""
    return self._found.get(self._name(key, dataclasses.asdict(chosen)), {})

  def add(self, key: str, chosen: blocks.Blocks, **found) -> None:
    """Adds to what is known."""
    record = dataclasses.asdict(chosen)
    entry = self.get(key, chosen) | found
    entry |= {'key': key, 'blocks': record, 'versions': self.versions}
    self._found[self._name(key, record)] = entry
    with open(self.path, 'a') as file:
      file.write(json.dumps(entry) + '\n')

  @staticmethod
  def _name(key, record):
    return key, json.dumps(record, sort_keys=True)


def sizes(problem: Problem) -> dict:
  """What `blocks` asks of a call."""
  return {
    'delta': problem.is_delta, 'residual': problem.has_residual, 'key_dim': problem.size,
    'value_dim': problem.size, 'dtype': problem.dtype, 'heads': problem.batch * problem.heads,
    'length': problem.length,
  }  # fmt: skip


def settled(problem: Problem, chosen: blocks.Blocks) -> blocks.Blocks:
  """What a record comes to in a call of the problem: two with the same answer need one trial."""
  heads = problem.batch * problem.heads
  return selftest.settled(chosen, value_dim=problem.size, heads=heads, length=problem.length)


def arguments(problem: Problem) -> tuple:
  """Arrays of q, k, v, gates and states."""
  arrays = on_device(problem, 0)
  state = jnp.zeros((problem.batch, problem.heads, problem.size, problem.size))
  inputs = tuple(arrays[n] for n in ('q', 'k', 'v', 'log_decay', 'beta'))
  return inputs + ((arrays['gamma'], state, state) if problem.has_residual else (None, state, None))


def build(problem: Problem, chosen: blocks.Blocks):
  """Forward with backward, compiled."""
  config = call.Config(problem.is_delta, problem.has_residual, 1.0, chosen, False)

  def both(do, *inputs):
    outputs, pullback = jax.vjp(lambda *x: call.attend(config, *x, None), *inputs)
    dstates = jax.tree.map(jnp.zeros_like, outputs[1:])
    return outputs, pullback((do, *dstates))

  inputs = jax.eval_shape(lambda: arguments(problem))
  return timing.prepare(both, (inputs[2], *inputs))


def is_right(problem: Problem, chosen: blocks.Blocks) -> bool:
  """The self-test's verdict, over whole chunks and a ragged end, all parts and pieces in use."""
  dims = (problem.dtype, problem.size, problem.size)
  chosen = selftest.shortened(settled(problem, chosen))
  case = selftest.Case(problem.is_delta, problem.has_residual, *dims, chosen, 'tuning')
  try:
    return all(
      max(selftest.check(case, length=length, seed=length).values()) <= 1
      for length in selftest.lengths(chosen)
    )
  except Exception as error:  # whatever the compiler or the driver raises is a finding
    tqdm.write(f'{case}: {type(error).__name__}: {str(error)[:200]}')
    return False


def warm_up(problems: list[Problem], log: Log) -> None:
  """Compiles and checks what every problem starts from, all at once; later they share kernels."""
  records = [blocks.heuristic(**sizes(p), hopper=is_hopper()) for p in problems]
  keys = [blocks.tuned_key(**sizes(p)) for p in problems]
  with concurrent.futures.ThreadPoolExecutor(WORKERS.value) as pool:
    built = [pool.submit(build, p, r) for p, r in zip(problems, records, strict=True)]
    checked = [pool.submit(is_right, p, r) for p, r in zip(problems, records, strict=True)]
    for _ in tqdm(concurrent.futures.as_completed(built + checked), 'start', len(built + checked)):
      pass
  for key, record, future in zip(keys, records, checked, strict=True):
    if 'right' not in log.get(key, record):
      log.add(key, record, right=future.result())


def measure(problem: Problem, key: str, found: list, inputs: tuple, log: Log, limit=float('inf')):
  """Logs peak bytes of every candidate and, if they are within the limit, milliseconds."""
  def is_unknown(known):
    is_small = known.get('peak_bytes', 0) <= limit
    return is_small and not {'milliseconds', 'error'} & known.keys()

  unknown = [c for c in found if is_unknown(log.get(key, c))]
  with concurrent.futures.ThreadPoolExecutor(WORKERS.value) as pool:
    compiling = [pool.submit(build, problem, c) for c in unknown]
  # All are compiled by now: beside a compiler, dispatch is late and times are wrong.
  for candidate, future in zip(unknown, tqdm(compiling, key, leave=False), strict=True):
    try:
      prepared = future.result()
      found_out = {'peak_bytes': timing.peak_bytes(prepared.once)}
      if found_out['peak_bytes'] <= limit:
        seconds = timing.measure(prepared, (inputs[2], *inputs), repeats=3).seconds
        found_out['milliseconds'] = seconds * 1e3
      log.add(key, candidate, **found_out)
    except Exception as error:  # a tile may be too large for the compiler or the card
      log.add(key, candidate, error=f'{type(error).__name__}: {str(error)[:200]}')


def fastest(problem: Problem, key: str, found: list[blocks.Blocks], log: Log, limit: float):
  """The fastest of the candidates that is right, or None; the first unless another gains."""
  timed = [c for c in found if 'milliseconds' in log.get(key, c)]
  timed = [c for c in timed if log.get(key, c)['peak_bytes'] <= limit]

  def cost(candidate):
    milliseconds = log.get(key, candidate)['milliseconds']
    return milliseconds * (1 - MARGIN.value * (candidate == found[0]))

  for candidate in sorted(timed, key=cost):
    if 'right' not in log.get(key, candidate):
      log.add(key, candidate, right=is_right(problem, candidate))
    if log.get(key, candidate)['right']:
      return candidate
    tqdm.write(f'{key}: wrong results on this card: {candidate}')
  return None


def tune(problem: Problem, log: Log, end: float, save) -> None:
  """Saves the best record of a problem after every part that was varied."""
  start = best = blocks.heuristic(**sizes(problem), hopper=is_hopper())
  key, inputs = blocks.tuned_key(**sizes(problem)), arguments(problem)
  measure(problem, key, [best], inputs, log)
  limit = MEMORY.value * log.get(key, best).get('peak_bytes', 0)
  for part in PARTS.value:
    if part == 'forward' and settled(problem, best).pair:
      continue  # pairs walk in its place
    if time.monotonic() > end:
      tqdm.write(f'{key}: {part} is left for another run: out of time')
      return
    found = candidate_lists.candidates(best, part, problem.size, thorough=THOROUGH.value)
    distinct: dict[blocks.Blocks, blocks.Blocks] = {}
    for candidate in found:
      distinct.setdefault(settled(problem, candidate), candidate)
    found = list(distinct.values())
    measure(problem, key, found, inputs, log, limit)
    best = fastest(problem, key, found, log, limit)
    if best is None:
      tqdm.write(f'{key}: nothing is right; no entry')
      return
    tried = [log.get(key, c) for c in found]
    errors = collections.Counter(x['error'].split(':')[0] for x in tried if 'error' in x)
    errors['over the memory limit'] = sum(x.get('peak_bytes', 0) > limit for x in tried)
    errors = ', '.join(f'{n} {e}' for e, n in errors.items() if n) or 'none'
    milliseconds = log.get(key, best)['milliseconds']
    tqdm.write(f'{key}: {part}: {milliseconds:.3f} ms of {len(found)}; fell out: {errors}')
    save(key, None if best == start else dataclasses.asdict(best))


def main(argv):
  """Tunes every problem asked for."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  if unknown := set(PARTS.value) - set(candidate_lists.PARTS):
    raise app.UsageError(f'--parts has {sorted(unknown)}; expected {candidate_lists.PARTS}')
  if unknown := set(RULES.value) - set(OPERATIONS):
    raise app.UsageError(f'--rules has {sorted(unknown)}; expected {sorted(OPERATIONS)}')
  jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(CACHE.value).expanduser()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  device = jax.devices()[0]
  if device.platform not in ('gpu', 'cuda'):
    raise app.UsageError(f'tuning needs an NVIDIA GPU; the platform is {device.platform}')
  path = pathlib.Path(OUT.value) if OUT.value else blocks.table_path(device.device_kind)
  sources = sorted(pathlib.Path(blocks.__file__).parent.glob('*.py'))
  digest = hashlib.sha256(b''.join(source.read_bytes() for source in sources)).hexdigest()[:12]
  log = Log(
    pathlib.Path(LOG.value) if LOG.value else path.with_suffix('.jsonl'),
    f'{device.device_kind}, Triton {triton.__version__}, jax {jax.__version__}, kernels {digest}',
  )

  def save(key, record):
    table = json.loads(path.read_text()) if path.exists() else {}
    table = {n: x for n, x in (table | {key: record}).items() if x is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + '\n')

  end = float('inf') if SECONDS.value is None else time.monotonic() + SECONDS.value
  problems = []
  for size, length, rule in itertools.product(SIZES.value, LENGTHS.value, RULES.value):
    batch, heads = max(1, TOKENS.value // int(length)), WIDTH.value // int(size)
    shape = (batch, int(length), heads, int(size))
    problems.append(Problem(OPERATIONS[rule], 'forward_backward', *shape, DTYPE.value))
  warm_up(problems, log)
  for problem in tqdm(problems, 'problems'):
    tune(problem, log, end, save)
  print(f'wrote {path}')


if __name__ == '__main__':
  app.run(main)
