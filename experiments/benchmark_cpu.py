"""Speed and memory of the plain-JAX forms on a CPU, over the length of the sequence.

    python experiments/benchmark_cpu.py            # a quarter of an hour; be alone
    python experiments/benchmark_cpu.py --lengths=256,1024 --updates=delta --budget=0.5   # minutes

Contenders: 'chunked', 'associative' and 'reference' of the library, and 'plain': a scan over chunks
as one writes it in 30 lines of jnp (below), with the inverse as a product of powers and the
gradient by automatic differentiation. (Such powers lose all digits when keys repeat; `jax.scipy`'s
triangular solve would not, but XLA's CPU client can hang in it inside a differentiated scan.) Each
is checked against the reference, on the shortest of the lengths, before it is timed.

Time is the median over rounds; in a round every contender runs in turn, so that what else the
machine does meets all of them: twice, and the second call counts, so that none pays for taking back
the memory that its predecessor returned to the system. Memory is the compiler's own account of the
program (arguments, results, temporaries), beside the bytes of q, k, v and o. What would need more
than --memory GiB is not run, and the line says so.

Writes benchmark_cpu.csv and benchmark_cpu.png to --out.
"""

import collections
import csv
import dataclasses
import datetime
import functools
import itertools
import math
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ops_benchmark.timing import peak_bytes
from tqdm import tqdm

from rla_jax import ops
from rla_jax.evaluation.provenance import commit
from rla_jax.training import ConfigError
from rla_jax.training.command_line import numbers, run

FLAGS = flags.FLAGS
LENGTHS = flags.DEFINE_list(
  'lengths', ['256', '512', '1024', '2048', '4096', '8192', '16384'], 'tokens of a sequence'
)
UPDATES = flags.DEFINE_list('updates', ['delta', 'additive'], 'delta, additive')
CONTENDERS = flags.DEFINE_list(
  'contenders', ['chunked', 'plain', 'associative', 'reference'],
  'chunked, plain, associative, reference',
)  # fmt: skip
BATCH = flags.DEFINE_integer('batch', 1, 'sequences')
HEADS = flags.DEFINE_integer('heads', 4, 'heads')
SIZE = flags.DEFINE_integer('size', 64, 'key and value size of a head')
BUDGET = flags.DEFINE_float('budget', 3.0, 'seconds of timing a contender, length and direction')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'least number of rounds', lower_bound=1)
MEMORY = flags.DEFINE_float('memory', 6.0, 'GiB that a program may need')
OUT = flags.DEFINE_string(
  'out', 'runs/benchmark_cpu', 'folder of the CSV file and the figure'
)

OPERATORS = {'additive': ops.residual_linear_attention, 'delta': ops.residual_delta_rule}
DIRECTIONS = ('forward', 'forward_backward')
GIB = 2**30


def plain(q, k, v, log_decay, beta, gamma, *, update, size=64, clip=1.0):
  """The chunk form in the fewest lines; the length is a multiple of `size`, decays are finite."""
  B, T, H, V = v.shape
  lower, strict = jnp.tril(jnp.ones((size, size))), jnp.tril(jnp.ones((size, size)), -1)

  def chunks(x):
    x = x.reshape(B, T // size, size, H, -1)
    return x.transpose(1, 0, 3, 2, 4)

  def solve(rate, gram, value, before):
    if update == 'additive':
      return rate * value
    power, rows = -rate * gram, rate * (value - before)
    for _ in range(size.bit_length() - 1):  # (I - P)^-1 = ... (I + P^4) (I + P^2) (I + P)
      power, rows = power @ power, rows + power @ rows
    return rows

  def body(state, chunk):
    (S, R), (q, k, v, g, b, c) = state, chunk
    G = jnp.cumsum(g, axis=-2)
    Gx = G - g
    L = lower * jnp.exp(jnp.where(lower > 0, G - G.mT, 0))
    Lx = strict * jnp.exp(jnp.where(strict > 0, Gx - G.mT, 0))
    kk, qk = k @ k.mT, q @ k.mT
    A = strict * L * kk
    U = solve(b, A, v, jnp.exp(G) * (k @ S))
    r = jnp.clip(v - jnp.exp(Gx) * (k @ S) - (Lx * kk) @ U, -clip, clip)
    W = solve(c, A, r, jnp.exp(G) * (k @ R))
    o = jnp.exp(G) * (q @ S) + (strict * L * qk) @ U
    o += c * (jnp.exp(G) * (q @ R) + (L * qk) @ W)
    last, out = jnp.exp(G[..., -1:, :]), k * jnp.exp(G[..., -1:, :] - G)
    return (last * S + out.mT @ U, last * R + out.mT @ W), o

  zeros = jnp.zeros((B, H, k.shape[-1], V))
  state, o = jax.lax.scan(body, (zeros, zeros), [*map(chunks, (q, k, v, log_decay, beta, gamma))])
  return o.transpose(1, 0, 3, 2, 4).reshape(v.shape), state


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of the CSV file."""

  update: str
  direction: str
  length: int
  contender: str
  median_ms: float | None
  rounds: int
  tokens_per_s: float | None
  times_plain: float | None
  program_mib: float
  times_qkvo: float
  note: str


def problem(length: int, batch: int, heads: int, size: int) -> list[jax.Array]:
  """q, k, v, log decay, beta, gamma and the gradient of o: unit keys, decays near 1, float32."""
  rng = np.random.default_rng(0)
  q, k, v, do = rng.normal(size=(4, batch, length, heads, size))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  log_decay = -0.1 * rng.exponential(size=(batch, length, heads))
  beta, gamma = rng.uniform(0.1, 0.9, (2, batch, length, heads))
  return [jnp.asarray(x, jnp.float32) for x in (q, k, v, log_decay, beta, gamma, do)]


def program(contender: str, update: str, direction: str):
  """A jitted function of what `problem` gives."""
  if contender == 'plain':
    operator = functools.partial(plain, update=update)
  else:
    operator = functools.partial(OPERATORS[update], implementation=contender)

  def forward(*arrays):
    return operator(*arrays[:-1])[0]

  def forward_backward(*arrays):
    o, pull = jax.vjp(lambda *tokens: operator(*tokens)[0], *arrays[:-1])
    return o, pull(arrays[-1])

  return jax.jit({'forward': forward, 'forward_backward': forward_backward}[direction])


def times_qkvo(compiled, length: int, batch: int, heads: int, size: int) -> float:
  """Memory of a program over the bytes of q, k, v and o in float32."""
  return peak_bytes(compiled) / (4 * 4 * batch * length * heads * size)


def check(compiled: dict, arrays: list[jax.Array], update: str, direction: str):
  """Fails if a contender's program does not compute what the reference does."""
  reference = compiled.get('reference') or program('reference', update, direction)
  wanted = jax.tree.leaves(reference(*arrays))
  for name, function in compiled.items():
    for got, want in zip(jax.tree.leaves(function(*arrays)), wanted, strict=True):
      error = float(jnp.sqrt(jnp.mean((got - want) ** 2) / jnp.mean(want**2)))
      if not error < 2e-5:
        raise AssertionError(f'{name} differs from the reference by {error:.1e} ({update})')


def compare(update: str, direction: str, length: int, checked: bool, progress) -> list[Line]:
  """Compiles, checks (if so) and times all contenders on one length."""
  sizes = (BATCH.value, HEADS.value, SIZE.value)
  arrays = problem(length, *sizes)
  compiled, refused = {}, {}
  for name in CONTENDERS.value:
    progress.set_postfix_str(f'{update} {direction} T={length}: compiling {name}')
    built = program(name, update, direction).lower(*arrays).compile()
    (refused if peak_bytes(built) > MEMORY.value * GIB else compiled)[name] = built
  if checked:
    check(compiled, arrays, update, direction)
  progress.set_postfix_str(f'{update} {direction} T={length}: timing')
  times = _time_in_turn(compiled, arrays)
  medians = {name: statistics.median(found) for name, found in times.items()}
  lines = []
  for name in CONTENDERS.value:
    built, median = compiled.get(name) or refused[name], medians.get(name)
    lines.append(Line(
      update, direction, length, name,
      median_ms=median and round(median * 1e3, 3),
      rounds=len(times.get(name, ())),
      tokens_per_s=median and round(length * BATCH.value / median),
      times_plain=median and round(median / medians.get('plain', math.nan), 3),
      program_mib=round(peak_bytes(built) / 2**20, 2),
      times_qkvo=round(times_qkvo(built, length, *sizes), 2),
      note='' if name in compiled else f'not run: needs more than {MEMORY.value:g} GiB',
    ))  # fmt: skip
  return lines


def _time_in_turn(compiled, arrays) -> dict[str, list[float]]:
  """Seconds a call; contenders whose budget is spent leave after the least number of rounds."""
  times, spent = {name: [] for name in compiled}, collections.Counter()
  while True:
    running = [n for n in compiled if len(times[n]) < ROUNDS.value or spent[n] < BUDGET.value]
    if not running:
      return times
    for name in running:
      jax.block_until_ready(compiled[name](*arrays))
      start = time.perf_counter()
      jax.block_until_ready(compiled[name](*arrays))
      times[name].append(time.perf_counter() - start)
      spent[name] += times[name][-1]


def write_csv(path: pathlib.Path, lines: list[Line]):
  """All lines, each with what is needed to run it again."""
  about = {
    'batch': BATCH.value, 'heads': HEADS.value, 'size': SIZE.value, 'dtype': 'float32',
    'date': datetime.date.today().isoformat(), 'commit': commit() or 'unknown', 'cpu': _cpu(),
    'cores': os.cpu_count(), 'jax': jax.__version__, 'python': platform.python_version(),
    'command': ' '.join(['python', *sys.argv]),
  }  # fmt: skip
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w', newline='') as file:
    rows = [dataclasses.asdict(line) | about for line in lines]
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)


def draw(path: pathlib.Path, lines: list[Line]):
  """Time over length, a panel for each update and direction."""
  import matplotlib

  matplotlib.use('agg')
  import matplotlib.pyplot as plt

  updates = list(dict.fromkeys(line.update for line in lines))
  figure, axes = plt.subplots(
    len(updates), 2, figsize=(9, 3.4 * len(updates)), squeeze=False, sharex=True, sharey='row'
  )
  for (i, update), (j, direction) in itertools.product(enumerate(updates), enumerate(DIRECTIONS)):
    axis = axes[i, j]
    for name in dict.fromkeys(line.contender for line in lines):
      points = [
        (line.length, line.median_ms) for line in lines
        if (line.update, line.direction, line.contender) == (update, direction, name)
        and line.median_ms
      ]  # fmt: skip
      style = {'linestyle': '--', 'color': 'gray'} if name == 'plain' else {}
      if points:
        axis.plot(*zip(*points, strict=True), marker='o', markersize=3, label=name, **style)
    axis.set(
      xscale='log', yscale='log', title=f'{update} update, {direction.replace("_", " + ")}',
      xlabel='tokens' if i == len(updates) - 1 else '', ylabel='' if j else 'milliseconds',
    )  # fmt: skip
    axis.set_xscale('log', base=2)
    axis.grid(alpha=0.3)
  axes[0, 0].legend(frameon=False)
  figure.suptitle(
    f'batch {BATCH.value}, {HEADS.value} heads, K = V = {SIZE.value}, float32, {_cpu()}', fontsize=9
  )
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  plt.close(figure)


def render(lines: list[Line]) -> str:
  """The lines as a table."""
  form = '{:9} {:17} {:>6}  {:12} {:>10} {:>11} {:>8} {:>7}  {}'
  text = [form.format(
    'update', 'direction', 'tokens', 'contender', 'ms', 'tokens/s', 'x plain', 'x qkvo', ''
  )]  # fmt: skip
  for line in lines:
    numbers = (line.median_ms, line.tokens_per_s, line.times_plain, line.times_qkvo)
    shown = ['-' if x is None else f'{x:,}' for x in numbers]
    where = (line.update, line.direction, line.length, line.contender)
    text.append(form.format(*where, *shown, line.note).rstrip())
  text.append('x plain: time over that of the plain form; x qkvo: memory over that of q, k, v, o')
  return '\n'.join(text)


def _cpu():
  try:
    info = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return platform.processor() or platform.machine()
  names = [line.split(':', 1)[1].strip() for line in info.splitlines() if 'model name' in line]
  return names[0] if names else platform.machine()


def main(_):
  """Times everything that is asked for, prints it, writes it."""
  known = {'contenders': ['plain', 'chunked', 'associative', 'reference'], 'updates': [*OPERATORS]}
  for flag, names in known.items():
    unknown = sorted(set(FLAGS[flag].value) - set(names))
    if unknown:
      raise ConfigError(f'--{flag} has {unknown}; expected some of {names}')
  lengths = numbers(LENGTHS)
  if 'plain' in CONTENDERS.value and any(length % 64 for length in lengths):
    raise ConfigError(f'--lengths is {lengths}; the plain form takes multiples of 64')
  folder, lines = pathlib.Path(OUT.value), []
  work = list(itertools.product(UPDATES.value, DIRECTIONS, lengths))
  with tqdm(work, disable=None) as progress:
    for update, direction, length in progress:
      lines += compare(update, direction, length, length == min(lengths), progress)
      write_csv(folder / 'benchmark_cpu.csv', lines)  # what is interrupted keeps what it measured
  draw(folder / 'benchmark_cpu.png', lines)
  print(render(lines))
  print(f'written to {folder / "benchmark_cpu.csv"} and {folder / "benchmark_cpu.png"}')


if __name__ == '__main__':
  run(main)
