"""Compiles the TPU kernels and a training step with the real TPU compiler, without a TPU.

    python experiments/tpu_report.py                   # everything; hours on two cores
    python experiments/tpu_report.py --topologies=v5e:2x2 --sizes=128 --dtypes=bfloat16 --rules=rdn
    python experiments/tpu_report.py --suite=step      # the 1.5B training step alone

Needs `pip install -e '.[train,tpu]'` and no TPU: libtpu compiles for a described topology on any
host. Nothing is run (docs/tpu.md says what that means).

Suite `kernels`: every kernel, the kernel of one decode step, and beside them the same operator by
implementation="chunked". kernels.csv has, of each kernel, the bundles of its innermost loop a token
and head (a bundle is one instruction of the static schedule, a cycle where nothing waits for
memory), the bounds (tpu_schedule/bound.py), how busy each unit is, spilled registers, vector memory
and bytes moved. operators.csv has, of each pass, that it compiled or the error, memory, and XLA's
estimate for the plain form. totals.csv adds up the kernels that a pass runs.

Suite `step`: the training step of a config on a slice. step.csv has its memory a chip and its
arithmetic; step_kernels.csv and step_collectives.csv what it calls and communicates, with shapes,
bytes and how often, and any sign that tokens or heads are gathered for a kernel.

A case that is in the tables, compiled from the same sources, is left out unless --again is given;
so an interrupted report goes on where it stopped, and a part can be compiled anew.
"""

import importlib.util
import itertools
import pathlib
import signal
import sys
import time

from absl import flags
from tpu_schedule import figure, markdown, measure
from tpu_schedule.table import ROOT, Table, commit_of, stamp

from rla_jax.training.command_line import choices, numbers, run

FLAGS = flags.FLAGS
LIST, INT = flags.DEFINE_list, flags.DEFINE_integer
SUITE = LIST('suite', ['kernels', 'step'], 'what to compile: kernels, step')
TOPOLOGIES = LIST('topologies', ['v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'], 'of the kernels')
RULES = LIST('rules', ['rla', 'rdn', 'gla', 'gdn'], 'rla, rdn and, without residual, gla, gdn')
SIZES = LIST('sizes', ['64', '128', '256'], 'key and value sizes of a head')
DTYPES = LIST('dtypes', ['bfloat16', 'float32'], 'of q, k and v')
PROGRAMS = LIST('programs', ['pallas', 'decode', 'chunked'], 'pallas, decode, chunked')
BATCH = INT('batch', 1, 'sequences of the kernels')
TIME = INT('time', 4096, 'tokens of a sequence of the kernels')
HEADS = INT('heads', 8, 'heads of the kernels')
SCHEDULE = flags.DEFINE_bool('schedule', True, 'read schedules; off: compile only, faster')
CONFIG = flags.DEFINE_string('config', 'configs/rdn_1p5b.py', 'of the training step')
SLICE = flags.DEFINE_string('slice', 'v5e:16x16', 'topology of the training step')
MESHES = flags.DEFINE_multi_string(
  'mesh', ['2,128,1', '1,64,4'], 'devices along data, fsdp, tensor; may be repeated'
)
REMATS = LIST('remat', ['full', 'names'], 'what the training step keeps: models/remat.py')
STEP_BATCH = INT('step_batch', 256, 'sequences of the training step')
STEP_TIME = INT('step_time', 4096, 'tokens of each')
AGAIN = flags.DEFINE_bool('again', False, 'also compile what is in the tables already')
RESULTS = ROOT / 'experiments/results/tpu_schedule'
OUT = flags.DEFINE_string('out', str(RESULTS), 'folder of the tables')

SOURCES = {
  'pallas': ['kernels/residual/tpu'],
  'decode': ['kernels/residual/tpu'],
  'chunked': ['rla_jax/ops'],
  'step': ['kernels/residual/tpu', 'rla_jax', 'configs'],
}
OPERATOR = ('topology', 'rule', 'size', 'dtype', 'program', 'batch', 'time', 'heads')
STEP = ('topology', 'config', 'batch', 'time', 'data', 'fsdp', 'tensor', 'remat')


def main(argv):
  """Compiles what the flags name and is not in the tables yet."""
  del argv
  # As an exception, so that a compiler which is running is ended too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit('terminated'))
  choices(SUITE, RULES, DTYPES, PROGRAMS)
  numbers(SIZES)
  if importlib.util.find_spec('libtpu') is None:  # else every case would be a row with that error
    sys.exit("error: libtpu is not installed: pip install -e '.[train,tpu]'")
  suites = {'kernels': report_kernels, 'step': report_step}
  pathlib.Path(OUT.value).mkdir(parents=True, exist_ok=True)
  failed = [line for suite in SUITE.value for line in suites[suite]()]
  print(*failed, sep='\n')
  return 1 if failed else 0


def report_kernels() -> list[str]:
  """Fills kernels.csv, operators.csv and totals.csv; returns what failed."""
  operators, kernels = _table('operators', OPERATOR), _table('kernels', OPERATOR)
  cases = [
    dict(zip(OPERATOR, (*case, BATCH.value, TIME.value, HEADS.value)))
    for case in itertools.product(
      TOPOLOGIES.value, RULES.value, SIZES.value, DTYPES.value, PROGRAMS.value
    )
  ]
  for case in cases:
    case['size'] = int(case['size'])
  todo, marks = _missing(cases, operators)
  found = measure.operators(todo, SCHEDULE.value)
  for case, (rows, passes) in _progress(todo, found):
    mark = marks[case['program']]
    kernels.replace(case, [row | mark for row in rows])
    operators.replace(case, [row | mark for row in passes])
  totals = measure.totals(kernels.rows, operators.rows)
  table = _table('totals', ('topology',))
  table.rows = []
  table.replace({'topology': None}, totals)
  print('bundles a token and head: static schedule, compiled and not run')
  print(markdown.table(totals))
  figure.draw(totals, pathlib.Path(OUT.value) / 'bundles.png')
  return [
    f'FAILED {" ".join(str(row[name]) for name in (*OPERATOR[:5], "pass"))}: {row["error"]}'
    for case in cases
    for row in operators.find(case)
    if row['error']
  ]


def report_step() -> list[str]:
  """Fills step.csv, step_kernels.csv and step_collectives.csv; returns what failed."""
  tables = {name: _table(name, STEP) for name in ('step', 'step_kernels', 'step_collectives')}
  cases = [
    dict(zip(STEP, (
      SLICE.value, CONFIG.value, STEP_BATCH.value, STEP_TIME.value, *map(int, mesh.split(',')),
      remat,
    )))
    for mesh, remat in itertools.product(MESHES.value, REMATS.value)
  ]  # fmt: skip
  todo, marks = _missing(cases, tables['step'])
  for case, found in _progress(todo, measure.steps(todo)):
    for name, rows in found.items():
      tables[name].replace(case, [row | marks['step'] for row in rows])
  failed = []
  for case in cases:
    for row in tables['step'].find(case):
      where = ' '.join(f'{name} {row[name]}' for name in STEP)
      if row['error'] or row['problems']:
        failed.append(f'FAILED {where}: {row["error"] or row["problems"]}')
      else:
        print(f'{where}: {float(row["chip_gb"]):.2f} GB a chip, '
              f'{float(row["tflop_a_chip"]):.1f} TFLOP a chip')  # fmt: skip
  return failed


def _table(name, key):
  return Table(pathlib.Path(OUT.value) / f'{name}.csv', key)


def _missing(cases, table):
  """Cases that are to be compiled, and the stamp of rows by program."""
  marks = {name: stamp(commit_of(*paths)) for name, paths in SOURCES.items()}

  def is_there(case):
    mark, rows = marks[case.get('program', 'step')], table.find(case)
    same = all(row[name] == mark[name] for row in rows for name in ('commit', 'versions'))
    good = not any(row['error'] for row in rows)
    return rows and same and good and not mark['commit'].endswith('changed')

  todo = [case for case in cases if AGAIN.value or not is_there(case)]
  print(f'{len(cases)} cases, {len(cases) - len(todo)} in the tables already', file=sys.stderr)
  return todo, marks


def _progress(cases, results):
  """Pairs of a case and its result, as they come; a bar with the time that is left."""
  begin, total = time.monotonic(), len(cases)
  results = iter(results)
  for done, case in enumerate(cases):
    left = (time.monotonic() - begin) / done * (total - done) if done else None
    _bar(done, total, ' '.join(str(x) for x in list(case.values())[:5]), left)
    yield case, next(results)
  if cases:
    _bar(total, total, '', 0.0)


def _bar(done, total, what, left):
  filled = 30 * done // total
  bar = '#' * filled + '.' * (30 - filled)
  eta = '--:--' if left is None else f'{left // 60:.0f}:{left % 60:02.0f}'
  end = '\n' if done == total else ''
  print(f'\r[{bar}] {done}/{total} ETA {eta} {what:<44.44}', end=end, file=sys.stderr, flush=True)


if __name__ == '__main__':
  run(main)
