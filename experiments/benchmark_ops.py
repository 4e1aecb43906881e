"""Benchmarks the operators on one GPU, side by side with what else there is, errors first.

    python experiments/benchmark_ops.py                                  # everything, an hour
    python experiments/benchmark_ops.py --suites=speed --operations=rdn,gdn --lengths=2048 \\
        --implementations=triton,fla                                     # a minute
    python experiments/benchmark_ops.py --resume                         # goes on where it stopped

Three suites, in this order:
  accuracy  values and gradients of every implementation against a float64 oracle: plain, packed and
            correlated keys, several lengths and head sizes. A figure over its bar fails the run.
  speed     forward, and forward with backward, at a constant number of tokens: milliseconds,
            TFLOP/s, share of the floor (bytes and arithmetic at the card's measured rates), peak
            memory.
  decode    one token for many sequences: bytes of the states moved over time.

Contenders: 'triton' and 'chunked' (this library), 'cudnn' (flash attention from JAX) and 'fla'
(PyTorch, where torch and flash-linear-attention are installed; its 'rdn' and 'rla' are two passes
of its one-state kernels). What cannot run is named with its reason. How time is taken is told in
`ops_benchmark/timing.py` and, for PyTorch, `ops_benchmark/peers.py`.

Writes accuracy.csv, speed.csv, with --profile kernels.csv, and figures to --out; those of this
repository are in experiments/results. Without a GPU it wants to be told --out. Rows carry date,
commit, hardware, versions and command, and are written as they come: what is stopped keeps them,
and --resume measures the rest. Sizes, lengths and operations are measured in the order in which
they are given.
"""

import collections
import concurrent.futures
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # leaves memory for the peers

import jax
from absl import flags
from ops_benchmark import accuracy, contenders, figures, timing
from ops_benchmark.problem import OPERATIONS, Problem, on_device
from ops_benchmark.rows import Rows
from tqdm import tqdm

from rla_jax.training import ConfigError
from rla_jax.training.command_line import choices, numbers, run

LIST = flags.DEFINE_list
SUITES = LIST('suites', ['accuracy', 'speed', 'decode'], 'accuracy, speed, decode')
CONTENDERS = LIST(
  'implementations', ['triton', 'chunked', 'cudnn', 'fla'], 'triton, chunked, cudnn, fla'
)
SELECTED = LIST('operations', list(OPERATIONS), 'rdn, rla, gdn, simple_gla, flash')
DIRECTIONS = LIST('directions', ['forward', 'forward_backward'], 'forward, forward_backward')
LENGTHS = LIST('lengths', ['512', '2048', '8192', '32768', '131072'], 'tokens of a sequence')
SIZES = LIST('sizes', ['128'], 'key and value sizes of a head: 64, 128, 256')
TOKENS = flags.DEFINE_integer('tokens', 32768, 'tokens in all; a longer sequence runs alone')
WIDTH = flags.DEFINE_integer('width', 2048, 'heads times head size')
SEQUENCES = flags.DEFINE_integer('sequences', 256, 'sequences of the decode suite')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['bfloat16', 'float16', 'float32'], 'of q, k, v')
CHECKED_SIZES = LIST('accuracy_sizes', ['64', '100', '128', '256'], 'its head sizes')
CHECKED_LENGTHS = LIST('accuracy_lengths', ['1', '63', '2048', '4097'], 'its lengths, up to 4160')
REPEATS = flags.DEFINE_integer('repeats', 7, 'samples of a median')
PEER_SECONDS = flags.DEFINE_float('peer_seconds', None, 'stop the peers after so long')
SECONDS = flags.DEFINE_float('seconds', None, 'start no measurement of ours after so long a suite')
WORKERS = flags.DEFINE_integer('workers', 8, 'compilations at a time')
OUT = flags.DEFINE_string('out', 'runs/benchmark_ops', 'folder of the results')
APPEND = flags.DEFINE_bool('append', False, 'keep the rows of older files')
RESUME = flags.DEFINE_bool(
  'resume', False, 'keep them, and measure nothing again that this commit has measured here'
)
COMMIT = flags.DEFINE_string('commit', None, 'commit to record where the folder is no git checkout')
PROFILE = flags.DEFINE_bool('profile', False, 'also the time of each kernel of ours: kernels.csv')
SEED = flags.DEFINE_integer('seed', None, 'of the inputs; fresh ones if not given')


def provenance() -> dict[str, str]:
  """Date, commit, hardware, versions and command, for every row."""
  commit = COMMIT.value
  if commit is None:
    command = ['git', 'rev-parse', '--short', 'HEAD']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    commit = done.stdout.strip() or 'unknown'

  def version(name):
    try:
      return f'{name} {importlib.metadata.version(name)}'
    except importlib.metadata.PackageNotFoundError:
      return f'{name} none'

  packages = ('jax', 'jaxlib', 'triton', 'jax-triton', 'torch', 'flash-linear-attention')
  return {
    'date': datetime.date.today().isoformat(),
    'commit': commit,
    'hardware': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'versions': '; '.join(version(p) for p in packages),
    'command': ' '.join(['python', *sys.argv]),
  }


def result_file(name: str, source: dict, identity: tuple[str, ...]) -> Rows:
  """The file of a suite."""
  path = pathlib.Path(OUT.value) / f'{name}.csv'
  return Rows(path, source, identity, append=APPEND.value, resume=RESUME.value)


def deadline() -> float:
  """Time of the monotonic clock after which a suite that begins now measures nothing more."""
  return float('inf') if SECONDS.value is None else time.monotonic() + SECONDS.value


def accuracy_cases() -> list[tuple[str, Problem, bool, float]]:
  """Implementation, problem, whether sequences are packed, and how alike the keys are."""
  names = [n for n in SELECTED.value if n != 'flash']
  ours = [n for n in CONTENDERS.value if n in ('triton', 'chunked')]
  lengths = [int(n) for n in CHECKED_LENGTHS.value]
  longest = max((n for n in lengths if n <= 2048), default=64)
  variants = [(n, False, 0.0) for n in lengths] + [(longest, True, 0.0), (longest, False, 0.9)]

  def problem(operation, length, size):
    # Many short sequences: the gradient of a gate, a number a token and head, may be near zero by
    # chance, and two such numbers say nothing of the error.
    batch = max(1, 64 // length)
    return Problem(operation, 'forward_backward', batch, length, 2, size, DTYPE.value)

  return [
    (implementation, problem(operation, length, size), *rest)
    for implementation, operation, size, (length, *rest) in itertools.product(
      ours, names, map(int, CHECKED_SIZES.value), variants
    )
  ]


def check_accuracy(seed: int, file: Rows) -> list[str]:
  """Adds rows to the file; returns what is over its bar."""
  cases = []
  for case in accuracy_cases():
    implementation, problem, packed, correlation = case
    row = {
      'operation': problem.operation, 'implementation': implementation, 'size': problem.size,
      'length': problem.length, 'packed': packed, 'correlation': correlation,
      'dtype': problem.dtype,
    }  # fmt: skip
    if not file.has(row):
      cases.append((row, case))

  def check(index):
    row, (implementation, problem, packed, correlation) = cases[index]
    row['seed'] = seed + index
    return accuracy.check(
      problem, implementation, row['seed'], packed=packed, correlation=correlation
    )

  end = deadline()
  with concurrent.futures.ThreadPoolExecutor(WORKERS.value) as pool:
    reports = [pool.submit(check, index) for index in range(len(cases))]
    for (row, _), future in zip(cases, tqdm(reports, 'accuracy'), strict=True):
      if time.monotonic() > end and future.cancel():
        tqdm.write(f'{accuracy_name(row)}: not run: out of time')
        continue
      try:
        report = future.result()
      except NotImplementedError as error:
        tqdm.write(f'{accuracy_name(row)}: not run: {error}')
        continue
      found = report.failures(DTYPE.value)
      file.add(row | {
        'passed': not found, 'over_the_bar': '; '.join(found),
        'flipped_mask_entries': report.flipped,
        **{n: f'{e:.3e}' for n, e in report.errors.items()},
        **{f'cosine_{n}': f'{c:.6f}' for n, c in report.cosines.items()},
      })  # fmt: skip
  print_accuracy(file.current())
  return [f'{accuracy_name(r)}: {r["over_the_bar"]}' for r in file.current() if r['over_the_bar']]


def accuracy_name(row: dict) -> str:
  """A case of the accuracy suite, for a message."""
  name = f'{row["operation"]} {row["implementation"]} size {row["size"]} length {row["length"]}'
  name += ' packed' * (str(row['packed']) == 'True')
  return name + ' correlated' * (float(row['correlation']) > 0)


def print_accuracy(rows: list[dict]) -> None:
  """The worst figure of each tensor, over everything that an implementation was asked."""
  worst = collections.defaultdict(dict)
  gradients = [f'd{name}' for name in accuracy.NAMES]
  for row in rows:
    errors = worst[row['operation'], row['implementation']]
    for name in ('o', 'base', 'residual', *gradients, 'flipped_mask_entries'):
      if row.get(name, '') != '':
        errors[name] = max(errors.get(name, 0.0), float(row[name]))
  print('worst error against float64, RMS relative; clip mask pinned')
  for key, errors in worst.items():
    print(*key, ' '.join(f'{n} {e:.1e}' for n, e in errors.items()))


def problems() -> list[Problem]:
  """Every size of the speed and decode suites."""
  chosen = []
  sizes = [int(s) for s in SIZES.value]
  if 'speed' in SUITES.value:
    for size, length, operation, direction in itertools.product(
      sizes, map(int, LENGTHS.value), SELECTED.value, DIRECTIONS.value
    ):
      batch, heads = max(1, TOKENS.value // length), WIDTH.value // size
      chosen.append(Problem(operation, direction, batch, length, heads, size, DTYPE.value))
  if 'decode' in SUITES.value:
    for size, operation in itertools.product(sizes, SELECTED.value):
      if operation != 'flash':
        heads = WIDTH.value // size
        chosen.append(Problem(operation, 'decode', SEQUENCES.value, 1, heads, size, DTYPE.value))
  return chosen


def time_ours(chosen: list[Problem], seed: int, file: Rows, record, profile: Rows | None) -> None:
  """Times what runs in JAX, in this process: compiles everything, several at a time, then times.

  What each kernel of a call takes goes to `profile`.
  """
  cases = [(p, i) for p in chosen for i in contenders.implementations(p.operation)]
  cases = [(p, i) for p, i in cases if i in CONTENDERS.value]
  cases = [(p, i) for p, i in cases if not file.has(vars(p) | {'implementation': i})]

  def prepare(case):
    problem, implementation = case
    shapes = jax.eval_shape(lambda: contenders.arguments(problem, on_device(problem, seed)))
    function = contenders.build(problem, implementation)
    if problem.direction != 'decode':
      return timing.prepare(function, shapes)
    states = 1 + problem.has_residual
    return timing.prepare_in_place(function, shapes[:-states], shapes[-states:])

  end = deadline()
  with concurrent.futures.ThreadPoolExecutor(WORKERS.value) as pool:
    prepared = [pool.submit(prepare, case) for case in cases]
    list(tqdm(concurrent.futures.as_completed(prepared), 'compile', total=len(prepared)))
  for (problem, implementation), future in tqdm(list(zip(cases, prepared, strict=True)), 'speed'):
    name = f'{problem.operation} {implementation} {problem.direction} {problem.length}'
    if time.monotonic() > end:
      tqdm.write(f'{name}: not run: out of time')
      continue
    try:
      programs = future.result()
      arguments = contenders.arguments(problem, on_device(problem, seed))
      measured = timing.measure(programs, arguments, repeats=REPEATS.value)
    except (ArithmeticError, ImportError, NotImplementedError, ValueError, RuntimeError) as error:
      tqdm.write(f'{name}: not run: {str(error).splitlines()[0][:300]}')
      continue
    record({
      **vars(problem), 'implementation': implementation,
      'milliseconds': measured.seconds * 1e3, 'spread': measured.spread * 1e3, 'method': 'loop',
      'peak_bytes': measured.peak_bytes, 'compile_seconds': measured.compile_seconds,
    })  # fmt: skip
    if profile is not None:
      for kernel, seconds in timing.kernels(programs, arguments).items():
        what = {**vars(problem), 'implementation': implementation, 'kernel': kernel[:90]}
        profile.add(what | {'milliseconds': seconds * 1e3})
    del arguments


def time_peers(chosen: list[Problem], file: Rows, record) -> None:
  """Times fla's kernels in a process of their own, if it is installed."""
  if importlib.util.find_spec('torch') is None or importlib.util.find_spec('fla') is None:
    print('fla: not run: torch or flash-linear-attention is not installed')
    return
  wanted = [vars(p) for p in chosen if p.operation != 'flash']
  wanted = [p for p in wanted if not file.has(p | {'implementation': 'fla'})]
  if not wanted:
    return
  script = pathlib.Path(__file__).resolve().parent / 'ops_benchmark' / 'peers.py'
  # Off this repository's path: transformers would take its folder `kernels` for another package.
  root = pathlib.Path(__file__).resolve().parents[1]
  search = [p for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p]
  search = os.pathsep.join(p for p in search if pathlib.Path(p).resolve() != root)
  with tempfile.TemporaryDirectory() as folder:
    asked = pathlib.Path(folder, 'problems.json')
    asked.write_text(json.dumps(wanted))
    process = subprocess.Popen(
      [sys.executable, script, asked], cwd=folder, env=os.environ | {'PYTHONPATH': search},
      stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    # Its first call of an operation tunes for minutes, so time is up whenever it is up.
    timer = threading.Timer(PEER_SECONDS.value or threading.TIMEOUT_MAX, process.kill)
    timer.daemon = True
    timer.start()
    for line in process.stdout:
      if line.startswith('{'):
        record(json.loads(line) | {'implementation': 'fla'})
      else:
        print(line, end='')
    timer.cancel()
  if process.wait():
    print(f'fla: stopped (exit status {process.returncode}); the rows before that are kept')


def add_rates(row: dict, bandwidth: float, arithmetic: float) -> dict:
  """The row with what follows from a time: rates, share of the floor, memory over the tensors."""
  problem = Problem(**{n: row[n] for n in Problem.__dataclass_fields__})
  seconds = row['milliseconds'] * 1e-3
  floor = problem.floor_seconds(bandwidth, arithmetic)
  row = row | {
    'floor_milliseconds': floor * 1e3,
    'share_of_floor': floor / seconds,
    'tflops': problem.flops() / seconds * 1e-12,
    'share_of_copy_bandwidth': problem.bytes() / seconds / bandwidth,
    'microseconds_per_token': seconds * 1e6 / (problem.batch * problem.length),
    'copy_bytes_per_second': bandwidth,
    'bf16_flops_per_second': arithmetic,
  }
  if problem.direction != 'decode':
    tensors = 4 if problem.direction == 'forward' else 8  # q k v o, and their gradients
    row['peak_over_tensors'] = row['peak_bytes'] / (tensors * problem.qkvo_bytes)
  return row


def print_speed(r: dict) -> None:
  """One line of a measurement."""
  tqdm.write(
    f'{r["operation"]:10} {r["implementation"]:8} {r["direction"]:16} '
    f'{r["batch"]:4} x {r["length"]:6} x {r["heads"]:2} x {r["size"]:3}: '
    f'{r["milliseconds"]:8.3f} ms  {r["tflops"]:6.1f} TFLOP/s  '
    f'{100 * r["share_of_floor"]:5.1f} % of floor  '
    f'{100 * r["share_of_copy_bandwidth"]:5.1f} % of copy  {r["peak_bytes"] / 2**20:7.0f} MiB '
    f'{r["method"]}'
  )


def measure_speed(chosen: list[Problem], seed: int, file: Rows) -> None:
  """Times every problem, ours and then the peers', and draws the figures."""
  bandwidth, arithmetic = timing.ceilings()
  print(f'copy {bandwidth * 1e-12:.2f} TB/s, bf16 product {arithmetic * 1e-12:.0f} TFLOP/s')
  print('operation implementation direction batch x length x heads x size: milliseconds ...')

  def record(row):
    row = add_rates(row, bandwidth, arithmetic)
    print_speed(row)
    file.add(row)

  identity = (*Problem.__dataclass_fields__, 'implementation', 'kernel')
  profile = result_file('kernels', file.source, identity) if PROFILE.value else None
  time_ours(chosen, seed, file, record, profile)
  if 'fla' in CONTENDERS.value:
    time_peers(chosen, file, record)
  figures.draw(file.current(), pathlib.Path(OUT.value), file.source['hardware'])


def main(argv):
  """Runs the suites; exits with 1 if a figure is over its bar."""
  del argv
  choices(SUITES, CONTENDERS, SELECTED, DIRECTIONS)
  for flag in (LENGTHS, SIZES, CHECKED_LENGTHS, CHECKED_SIZES):
    numbers(flag)
  platform = jax.default_backend()
  if platform != 'gpu' and not flags.FLAGS['out'].present:
    raise ConfigError(f'the platform is {platform!r}, no GPU; to benchmark that, give --out')
  source = provenance()
  print(source['hardware'], source['versions'], f'commit {source["commit"]}', sep=' | ')
  seed = SEED.value if SEED.value is not None else int.from_bytes(os.urandom(3), 'little')
  failures = []
  if 'accuracy' in SUITES.value:
    identity = ('operation', 'implementation', 'size', 'length', 'packed', 'correlation', 'dtype')
    failures = check_accuracy(seed, result_file('accuracy', source, identity))
    for failure in failures:
      print('OVER THE BAR:', failure)
  if chosen := problems():
    identity = (*Problem.__dataclass_fields__, 'implementation')
    measure_speed(chosen, seed, result_file('speed', source, identity))
  if failures:
    sys.exit(f'{len(failures)} cases of the accuracy suite are over their bars')


if __name__ == '__main__':
  run(main)
