"""Compiles every TPU kernel with the real TPU compiler, without a TPU, and reads its schedule.

    python experiments/tpu_report.py                                         # everything
    python experiments/tpu_report.py --topologies=v5e:2x2 --sizes=128 --dtypes=bfloat16

Needs `pip install rla-jax[tpu]` and no TPU: libtpu compiles for a described topology on any host.
Nothing is run. A line tells, of one kernel: the bundles of the innermost loop a token and head, the
bound of the matrix unit (useful products at the full bf16 rate, tpu_schedule/bound.py), the share
of it, which units are busy, and spilled registers; of one operator: that it compiled (or the
error), its memory, and the vector memory of a grid step. A bundle is one instruction of the static
schedule, a cycle where nothing waits for memory. Beside the kernels stands the same operator by
`implementation="chunked"`: arithmetic and bytes of its optimised program.

Kernels: prepare (the triangular inverses; delta rule only), forward, forward_saving (keeps what the
backward pass reads), backward. Totals add up what a pass runs.

Writes kernels.csv, totals.csv, operators.csv and bundles.svg to --out; rows carry date, commit,
versions and command.
"""

import concurrent.futures
import csv
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags
from tpu_schedule import bound, dump

FLAGS = flags.FLAGS
_SHOWN = ('--topologies', '--rules', '--sizes', '--dtypes', '--batch', '--time', '--heads')
ROOT = pathlib.Path(__file__).resolve().parents[1]
LIST = flags.DEFINE_list
TOPOLOGIES = LIST('topologies', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'], 'as libtpu names them')
RULES = LIST('rules', ['rla', 'rdn', 'gla', 'gdn'], 'rla, rdn and, without residual, gla, gdn')
SIZES = LIST('sizes', ['64', '128', '256'], 'key and value sizes of a head')
DTYPES = LIST('dtypes', ['bfloat16', 'float32'], 'of q, k and v')
IMPLEMENTATIONS = LIST('implementations', ['pallas', 'chunked'], 'pallas, chunked')
BATCH = flags.DEFINE_integer('batch', 1, 'sequences')
TIME = flags.DEFINE_integer('time', 512, 'tokens of a sequence')
HEADS = flags.DEFINE_integer('heads', 8, 'heads')
JOBS = flags.DEFINE_integer('jobs', 1, 'compilations at a time')
SCHEDULE = flags.DEFINE_bool('schedule', True, 'read schedules; off: compile only, much faster')
RESULTS = ROOT / 'experiments/results/tpu_schedule'
OUT = flags.DEFINE_string('out', str(RESULTS), 'folder of the results')


def main(argv):
  """Compiles what the flags name and writes the tables."""
  del argv
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  cases = [
    {
      'topology': topology, 'rule': rule, 'size': int(size), 'dtype': dtype,
      'implementation': implementation,
      'batch': BATCH.value, 'time': TIME.value, 'heads': HEADS.value,
    }
    for topology, dtype, size, rule, implementation in itertools.product(
      TOPOLOGIES.value, DTYPES.value, SIZES.value, RULES.value, IMPLEMENTATIONS.value
    )
  ]  # fmt: skip
  kernels, operators = [], []
  with concurrent.futures.ThreadPoolExecutor(JOBS.value) as pool:
    for done, (rows, operator) in enumerate(pool.map(measure, cases), 1):
      kernels += rows
      operators += operator
      _progress(done, len(cases), f'{operator[0]["topology"]} {operator[0]["rule"]}')
      totals = add_up(kernels)
      for name, table in (('kernels', kernels), ('totals', totals), ('operators', operators)):
        _write(out / f'{name}.csv', table)
  _print(totals)
  failed = [row for row in operators if row['error']]
  for row in failed:
    print(f'FAILED {row["topology"]} {row["rule"]} {row["size"]} {row["dtype"]}: {row["error"]}')
  _draw(totals, out / 'bundles.svg')
  return 1 if failed else 0


def measure(case: dict) -> tuple[list[dict], list[dict]]:
  """Compiles a case: (rows of its kernels, rows of its passes)."""
  label = {name: case[name] for name in ('topology', 'rule', 'size', 'dtype', 'implementation')}
  with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
    folder = pathlib.Path(folder)
    env = dict(
      os.environ,
      JAX_PLATFORMS='cpu',
      TPU_SKIP_MDS_QUERY='1',
      ALLOW_MULTIPLE_LIBTPU_LOAD='1',  # no chip is opened, so none needs a lock
      PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
    )
    scheduled = SCHEDULE.value and case['implementation'] == 'pallas'
    if scheduled:
      env['LIBTPU_INIT_ARGS'] = dump.flags(folder)
    child = pathlib.Path(__file__).parent / 'tpu_schedule/compile.py'
    command = [sys.executable, str(child), json.dumps(case)]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    if done.returncode:
      lines = [line for line in done.stderr.splitlines() if line.strip()]
      error = next((x for x in reversed(lines) if 'Error' in x or 'error' in x), lines[-1])
      return [], [label | {'pass': 'both', 'error': error[:300]}]
    result = next(x for x in done.stdout.splitlines() if x.startswith('RESULT '))
    found = json.loads(result.removeprefix('RESULT '))
    vmem = {name: found.get(name, '') for name in ('vmem_estimate', 'vmem_limit')}
    operators = [
      label | {'pass': name, 'error': ''} | found[name] | vmem
      for name in ('forward', 'forward_backward')
    ]
    if not scheduled:
      return [], operators
    return [_kernel_row(label, found, folder, name) for name in _kernels(case['rule'])], operators


def _kernels(rule):
  names = ['forward', 'forward_saving', 'backward']
  return ['prepare', *names] if rule in ('rdn', 'gdn') else names


def _kernel_row(label, found, folder, name):
  loop = dump.kernel_loop(folder, f'residual_{name}')
  tokens = found['chunk'] * found['block_heads']
  units = [unit for unit in dump.UNITS if unit not in ('FILL', 'SPILL')]
  shares = {unit: round(loop.share(unit), 3) for unit in units}
  row = label | {
    'kernel': name,
    'chunk': found['chunk'],
    'block_heads': found['block_heads'],
    'bundles_a_chunk_and_head': round(loop.bundles / found['block_heads'], 1),
    'bundles_a_token_and_head': round(loop.bundles / tokens, 2),
    'spills': loop.used['SPILL'],
    'fills': loop.used['FILL'],
  }
  if name != 'prepare':
    generation = label['topology'].split(':')[0]
    direction = name.split('_')[0]
    least = bound.cycles(
      label['rule'], direction, generation, loop.slots['MXU'], label['size'], found['chunk']
    )
    row['bound'] = round(least, 2)
    row['share_of_bound'] = round(least * tokens / loop.bundles, 3)
  return row | shares


def add_up(kernels: list[dict]) -> list[dict]:
  """Bundles a token and head of a pass: forward alone, forward in training, backward."""
  index = ('topology', 'dtype', 'size', 'rule')
  groups = {}
  for row in kernels:
    groups.setdefault(tuple(row[i] for i in index), {})[row['kernel']] = row
  rows = []
  for key, group in groups.items():
    bundles = {name: row['bundles_a_token_and_head'] for name, row in group.items()}
    before = bundles.get('prepare', 0)
    rows.append(
      dict(zip(index, key))
      | {
        'forward': round(before + bundles['forward'], 2),
        'forward_bound': group['forward']['bound'],
        'forward_saving': round(before + bundles['forward_saving'], 2),
        'backward': bundles['backward'],
        'backward_bound': group['backward']['bound'],
      }
    )
  return rows


def _print(totals):
  print('bundles a token and head: static schedule, compiled and not run')
  names = ('topology', 'dtype', 'size', 'rule', 'forward', 'forward_saving', 'backward')
  print(' '.join(f'{name:>14}' for name in names))
  for row in totals:
    print(' '.join(f'{row[name]!s:>14}' for name in names))


def _write(path, rows):
  if not rows:
    return
  names = list(dict.fromkeys(name for row in rows for name in row))
  stamp = _stamp()
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, [*names, *stamp], restval='')
    writer.writeheader()
    writer.writerows(row | stamp for row in rows)


def _stamp():
  def version(name):
    try:
      return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      return 'not installed'

  commit = subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, text=True, capture_output=True
  ).stdout.strip()
  # Where the results went is nobody's business.
  arguments = [x for x in FLAGS.flags_into_string().splitlines() if x.split('=')[0] in _SHOWN]
  return {
    'date': datetime.date.today().isoformat(),
    'commit': commit,
    'versions': f'jax {version("jax")}, libtpu {version("libtpu")}',
    'command': ' '.join(['python experiments/tpu_report.py', *arguments]),
  }


def _draw(totals, path):
  try:
    import matplotlib.pyplot as plt
  except ImportError:
    print(f'no figure: matplotlib is not installed ({path.name})')
    return
  rows = [row for row in totals if row['dtype'] == 'bfloat16' and row['size'] == 128]
  if not rows:
    return
  figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout='constrained')
  names = [f'{row["rule"].upper()}\n{row["topology"].split(":")[0]}' for row in rows]
  for axis, direction in zip(axes, ('forward', 'backward')):
    axis.bar(names, [row[direction] for row in rows], color='#4477aa', label='static schedule')
    least = [row[f'{direction}_bound'] for row in rows]
    axis.bar(names, least, color='#ee6677', width=0.4, label='matrix-unit bound')
    axis.set(title=direction, ylabel='bundles a token and head')
    axis.tick_params(axis='x', labelsize=7)
    axis.legend()
  figure.suptitle('bf16, K = V = 128: compiled for the TPU named, not run')
  figure.savefig(path)


def _progress(done, total, what):
  filled = 30 * done // total
  bar = '#' * filled + '.' * (30 - filled)
  print(f'\r[{bar}] {done}/{total} {what:<24}', end='\n' if done == total else '', file=sys.stderr)


def _memory_folder():
  """The dumps are some hundred megabytes a case, and short-lived."""
  return '/dev/shm' if os.access('/dev/shm', os.W_OK) else None


if __name__ == '__main__':
  app.run(main)
