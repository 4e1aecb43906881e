"""Tunes the block sizes of the Triton kernels on the card at hand and writes its table.

    python experiments/tune_kernels.py                            # the usual sizes
    python experiments/tune_kernels.py --rules=delta_residual --lengths=2048 --sizes=128   # minutes
    python experiments/tune_kernels.py --seconds=500              # then again: goes on

For every problem, one part of the record after the other is varied (each kernel's tile, warps and
pipeline, whether programs walk in pairs, the parts and pieces of a sequence), starting from what is
in use, and the fastest forward with backward is kept, if it gains enough (--margin) and takes no
more memory (--memory). Values and gradients of a candidate are checked as in the self-test before
it is chosen, so a configuration that this compiler gets wrong does not enter the table. Times are
taken as in benchmark_ops.py, with nothing compiled meanwhile.

A problem that is through goes to kernels/residual/gpu/tuned/CARD.json, which the kernels read, if
it still gains that much over the heuristic when both are timed again; else its entry goes. Entries
of other problems stay. What was measured goes to a log beside the table as it comes, CARD.jsonl, or
to --log: a run that is stopped goes on from there, as long as the kernels, Triton and JAX are the
same. Delete it to measure afresh. Compiled kernels are kept in --cache.
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

try:
  import triton
except ModuleNotFoundError:
  raise SystemExit("error: triton is not installed: pip install -e '.[cuda,train]'") from None
from absl import flags
from ops_benchmark import timing
from ops_benchmark.problem import Problem, on_device
from ops_benchmark.tuning_log import Log, named
from tqdm import tqdm

from rla_jax.kernels.residual.gpu import blocks, call, selftest
from rla_jax.kernels.residual.gpu import candidates as candidate_lists
from rla_jax.kernels.residual.gpu.launch import is_hopper
from rla_jax.training import ConfigError
from rla_jax.training.command_line import choices, numbers, run

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
MEMORY = flags.DEFINE_float('memory', 1.0, "most peak memory, as a multiple of the heuristic's")
PARTS = LIST(
  'parts', ['keys', 'queries', 'forward', 'pair', 'sweep', 'prepare', 'fill', 'pieces'],
  f'what to vary, in order, of {", ".join(candidate_lists.PARTS)}',
)  # fmt: skip
MARGIN = flags.DEFINE_float('margin', 0.02, 'share of the time in use that another has to save')
THOROUGH = flags.DEFINE_bool('thorough', False, 'try every launch, not the promising ones alone')
SECONDS = flags.DEFINE_float('seconds', None, 'begin nothing after so long: what is begun ends')
WORKERS = flags.DEFINE_integer('workers', 8, 'compilations at a time')
CACHE = flags.DEFINE_string('cache', '~/.cache/rla_jax', 'folder of the compilation cache')
OUT = flags.DEFINE_string('out', None, "file of the table; the package's own if not given")
LOG = flags.DEFINE_string('log', None, "file of the log; the table's with .jsonl if not given")

OPERATIONS = {
  'delta_residual': 'rdn', 'additive_residual': 'rla', 'delta': 'gdn', 'additive': 'simple_gla'
}  # fmt: skip


def sizes(problem: Problem) -> dict:
  """What `blocks` asks of a call."""
  return {
    'delta': problem.is_delta, 'residual': problem.has_residual, 'key_dim': problem.size,
    'value_dim': problem.size, 'dtype': problem.dtype, 'heads': problem.batch * problem.heads,
    'length': problem.length,
  }  # fmt: skip


def launches(problem: Problem, chosen: blocks.Blocks) -> tuple:
  """What a record comes to in a call: two records with the same answer need one trial."""
  call_ = {n: x for n, x in sizes(problem).items() if n in ('value_dim', 'heads', 'length')}
  return selftest.settled(chosen, **call_), selftest.parts(chosen, **call_)


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
  chosen = selftest.shortened(launches(problem, chosen)[0])
  case = selftest.Case(problem.is_delta, problem.has_residual, *dims, chosen, 'tuning')
  try:
    return all(
      max(selftest.check(case, length=length, seed=length).values()) <= 1
      for length in selftest.lengths(chosen)
    )
  except Exception as error:  # whatever the compiler or the driver raises is a finding
    tqdm.write(f'{case}: {type(error).__name__}: {str(error)[:200]}')
    return False


def finished(futures: list, what: str) -> None:
  """Waits for all, with a progress bar."""
  for _ in tqdm(concurrent.futures.as_completed(futures), what, len(futures), leave=False):
    pass


def warm_up(problems: list[Problem], log: Log) -> None:
  """Compiles and checks what problems start from, all at once; their candidates share kernels."""
  starts = [(p, in_use(p)) for p in problems]
  starts = [(p, start) for p, start in starts if 'right' not in log.get(p, start)]
  with concurrent.futures.ThreadPoolExecutor(WORKERS.value) as pool:
    built = [pool.submit(build, *start) for start in starts]  # `measure` finds what fails
    checked = [pool.submit(is_right, *start) for start in starts]
    finished(built + checked, 'start')
  for start, future in zip(starts, checked, strict=True):
    log.add(*start, right=future.result())


def measure(problem: Problem, found: list, inputs: tuple, log: Log, limit=float('inf')) -> None:
  """Logs peak bytes of every candidate and, if they are within the limit, milliseconds."""
  def is_unknown(known):
    is_small = known.get('peak_bytes', 0) <= limit
    return is_small and not {'milliseconds', 'error'} & known.keys()

  unknown = [c for c in found if is_unknown(log.get(problem, c))]
  with concurrent.futures.ThreadPoolExecutor(WORKERS.value) as pool:
    builds = [pool.submit(build, problem, c) for c in unknown]
    finished(builds, f'{named(problem)} compile')
  # All are compiled by now: beside a compiler, dispatch is late and times are wrong.
  for candidate, built in zip(unknown, tqdm(builds, named(problem), leave=False), strict=True):
    try:
      prepared = built.result()
      found_out = {'peak_bytes': timing.peak_bytes(prepared.once)}
      if found_out['peak_bytes'] <= limit:
        found_out['milliseconds'] = milliseconds(prepared, inputs)
      log.add(problem, candidate, **found_out)
    except Exception as error:  # a tile may be too large for the compiler or the card
      log.add(problem, candidate, error=f'{type(error).__name__}: {str(error)[:200]}')


def milliseconds(prepared: timing.Prepared, inputs: tuple) -> float:
  """The time of what was built."""
  return timing.measure(prepared, (inputs[2], *inputs), repeats=3).seconds * 1e3


def fastest(problem: Problem, found: list[blocks.Blocks], log: Log, limit: float):
  """The fastest of the candidates that is right, or None; the first unless another gains."""
  timed = [c for c in found if 'milliseconds' in log.get(problem, c)]
  timed = [c for c in timed if log.get(problem, c)['peak_bytes'] <= limit]

  def cost(candidate):
    time_ = log.get(problem, candidate)['milliseconds']
    return time_ * (1 - MARGIN.value * (candidate == found[0]))

  for candidate in sorted(timed, key=cost):
    if 'right' not in log.get(problem, candidate):
      log.add(problem, candidate, right=is_right(problem, candidate))
    if log.get(problem, candidate)['right']:
      return candidate
    tqdm.write(f'{named(problem)}: wrong results on this card: {candidate}')
  return None


def still_gains(problem: Problem, best: blocks.Blocks, than: blocks.Blocks, inputs: tuple) -> bool:
  """Whether a record gains when it is timed again beside the other, each twice."""
  pair = [build(problem, chosen) for chosen in (best, than)]
  samples = [[milliseconds(prepared, inputs) for prepared in pair] for _ in range(2)]
  times = [min(sample) for sample in zip(*samples, strict=True)]
  tqdm.write(f'{named(problem)}: {times[0]:.3f} ms, by the heuristic {times[1]:.3f}')
  return times[0] <= (1 - MARGIN.value) * times[1]


def in_use(problem: Problem) -> blocks.Blocks:
  """What the kernels would take now."""
  return blocks.choose(jax.devices()[0].device_kind, hopper=is_hopper(), **sizes(problem))


def tune(problem: Problem, log: Log, end: float, save) -> None:
  """Saves the best record of a problem, None where the heuristic's is, once it is through."""
  heuristic = blocks.heuristic(**sizes(problem), hopper=is_hopper())
  best, inputs, limit = in_use(problem), None, float('inf')
  for part in ('start', *PARTS.value):
    if part == 'forward' and launches(problem, best)[0].pair:
      continue  # pairs walk in its place
    if time.monotonic() > end:
      tqdm.write(f'{named(problem)}: {part} is left for another run: out of time')
      return
    found = [best, heuristic]
    if part != 'start':
      found = candidate_lists.candidates(best, part, problem.size, thorough=THOROUGH.value)
    distinct: dict[tuple, blocks.Blocks] = {}
    for candidate in found:
      distinct.setdefault(launches(problem, candidate), candidate)
    found = list(distinct.values())
    inputs = inputs or arguments(problem)
    measure(problem, found, inputs, log, limit)
    best = fastest(problem, found, log, limit) or best  # another part may be what is wrong
    tried = [log.get(problem, c) for c in found]
    errors = collections.Counter(x['error'].split(':')[0] for x in tried if 'error' in x)
    errors['over the memory limit'] = sum(x.get('peak_bytes', 0) > limit for x in tried)
    errors = ', '.join(f'{n} {e}' for e, n in errors.items() if n) or 'none'
    time_ = log.get(problem, best).get('milliseconds', float('nan'))
    tqdm.write(f'{named(problem)}: {part}: {time_:.3f} ms of {len(found)}; fell out: {errors}')
    if part == 'start' and 'peak_bytes' in log.get(problem, heuristic):
      limit = MEMORY.value * log.get(problem, heuristic)['peak_bytes']
  if not log.get(problem, best).get('right'):
    tqdm.write(f'{named(problem)}: nothing is right; the table stays as it is')
    return
  is_better = best != heuristic and (
    not log.get(problem, heuristic).get('right') or still_gains(problem, best, heuristic, inputs)
  )
  save(blocks.tuned_key(**sizes(problem)), dataclasses.asdict(best) if is_better else None)


def main(argv):
  """Tunes every problem asked for."""
  del argv
  choices(RULES)
  asked = itertools.product(numbers(SIZES), numbers(LENGTHS), RULES.value)
  if unknown := set(PARTS.value) - set(candidate_lists.PARTS):
    raise ConfigError(f'--parts has {sorted(unknown)}; expected {candidate_lists.PARTS}')
  jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(CACHE.value).expanduser()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  device = jax.devices()[0]
  if device.platform not in ('gpu', 'cuda'):
    raise ConfigError(f'tuning needs an NVIDIA GPU; the platform is {device.platform}')
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
    unfinished = path.with_suffix('.part')
    unfinished.write_text(json.dumps(table, indent=1, sort_keys=True) + '\n')
    unfinished.replace(path)  # kernels may read it meanwhile

  end = float('inf') if SECONDS.value is None else time.monotonic() + SECONDS.value
  problems = []
  for size, length, rule in asked:
    shape = (max(1, TOKENS.value // length), length, WIDTH.value // size, size)
    problems.append(Problem(OPERATIONS[rule], 'forward_backward', *shape, DTYPE.value))
  warm_up(problems, log)
  for problem in tqdm(problems, 'problems'):
    tune(problem, log, end, save)
  print(f'wrote {path}')


if __name__ == '__main__':
  run(main)
