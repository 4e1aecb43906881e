"""Runs the compiler, in processes of its own, and makes rows of what it says."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from tpu_schedule import bound, dump
from tpu_schedule.table import STAMP

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
DELTA = ('rdn', 'gdn')
BASE_MODEL = {'rla': 'gla', 'rdn': 'gdn'}
# The kernels that a pass runs: forward alone, forward in training, backward.
PARTS = {
  'forward': ('prepare', 'forward'),
  'forward_saving': ('prepare', 'forward_saving'),
  'backward': ('backward',),
}


def operators(cases: list[dict], schedule: bool) -> Iterator[tuple[list[dict], list[dict]]]:
  """Compiles cases: for each the rows of its kernels and the rows of its passes.

  The compiler reads the folder of its dump once, when it is loaded. So with schedules every case
  has a process of its own; without them all share one.
  """
  if not schedule:
    for case, found in zip(cases, _children('compile', cases)):
      yield _rows(case, found, None)
    return
  for case in cases:
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
      folder = None if case['program'] == 'chunked' else pathlib.Path(folder)
      (found,) = _children('compile', [case], folder)
      yield _rows(case, found, folder)


def _children(program: str, cases: list[dict], folder=None) -> Iterator[dict]:
  """What `program`.py says of each case; where it broke off {'error': ...}, then of the next."""
  env = dict(
    os.environ,
    JAX_PLATFORMS='cpu',
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',  # no chip is opened, so none needs a lock
    PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
  )
  env.pop('XLA_FLAGS', None)
  if folder is not None:
    env['LIBTPU_INIT_ARGS'] = dump.flags(folder)
  left = list(cases)
  while left:
    command = [sys.executable, str(FOLDER / f'{program}.py'), json.dumps(left)]
    with tempfile.TemporaryFile('w+') as errors:
      with subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT
      ) as process:
        try:
          for line in process.stdout:
            if line.startswith('RESULT '):
              left.pop(0)
              yield json.loads(line.removeprefix('RESULT '))
        except BaseException:
          process.kill()  # the report was stopped: its compiler must not go on alone
          raise
      if left:
        errors.seek(0)
        lines = [line for line in errors if line.strip()] or ['no output']
        named = [line for line in lines if 'Error' in line or 'error' in line]
        left.pop(0)
        yield {'error': f'exit {process.returncode}: {(named or lines)[-1].strip()[:400]}'}


def _rows(case, found, folder):
  if 'error' in found:
    return [], [case | {'pass': 'all', 'error': found['error']}]
  return _kernel_rows(case, found, folder), _pass_rows(case, found)


def _pass_rows(case, found):
  tokens = case['heads'] * case['batch'] * (1 if case['program'] == 'decode' else case['time'])
  rows = []
  for name, measures in found['passes'].items():
    if name.endswith('_one_chunk'):
      continue
    row = case | {'pass': name} | measures
    # XLA knows neither the inside of a kernel nor how often a loop runs.
    for unit in ('flops', 'bytes'):
      row.pop(unit, None)
      one = found['passes'].get(f'{name}_one_chunk', {})
      row[f'{unit}_a_token_and_head'] = round(one[unit] / tokens) if unit in one else ''
    rows.append(row)
  return rows


def _kernel_rows(case, found, folder):
  wanted = {
    'pallas': ['prepare'] * (case['rule'] in DELTA) + ['forward', 'forward_saving', 'backward'],
    'decode': ['step'],
    'chunked': [],
  }
  rows = []
  for name in wanted[case['program']]:
    if name in found['kernels']:
      rows.append(_kernel_row(case, found, folder, name))
  return rows


def _kernel_row(case, found, folder, name):
  step = name == 'step'
  facts = found['kernels'][name]
  tokens = case['batch'] * case['heads'] * (1 if step else case['time'])
  row = case | {
    'kernel': name,
    'chunk': 1 if step else found['chunk'],
    'block_heads': found['step_heads'] if step else found['block_heads'],
    'vmem': facts['vmem'],
    'hbm_bytes_a_token_and_head': round(facts['hbm_bytes'] / tokens, 1),
  }
  if folder is None:
    return row
  loop = dump.kernel_loop(folder, f'residual_{name}')
  tokens = row['chunk'] * row['block_heads']
  generation = case['topology'].split(':')[0]
  units = loop.slots['MXU']
  row |= {
    'bundles_a_token_and_head': round(loop.bundles / tokens, 2),
    'matrix_units': units,
    'spills': loop.used['SPILL'],
    'fills': loop.used['FILL'],
    'memory_bound': round(
      bound.memory_cycles(generation, units, row['hbm_bytes_a_token_and_head']), 2
    ),
  }
  if name not in ('prepare', 'step'):
    least = bound.matrix_cycles(
      case['rule'], name.split('_')[0], generation, units, case['size'], row['chunk'],
      case['dtype'],
    )  # fmt: skip
    row |= {'bound': round(least, 2), 'share_of_bound': round(least * tokens / loop.bundles, 3)}
  shown = [unit for unit in dump.UNITS if unit not in ('FILL', 'SPILL')]
  return row | {unit: round(loop.share(unit), 3) for unit in shown}


def steps(cases: list[dict]) -> Iterator[dict[str, list[dict]]]:
  """Compiles training steps: of each the rows of step, step_kernels and step_collectives."""
  axes = ('data', 'fsdp', 'tensor')
  full = [case | {'mesh': {name: case[name] for name in axes}} for case in cases]
  for case, found in zip(cases, _children('training_step', full)):
    yield _step_rows(case, found)


def _step_rows(case, found):
  if 'error' in found:
    row = case | {'error': found['error']}
    return {'step': [row], 'step_kernels': [], 'step_collectives': []}
  # What is donated and returned takes its place once.
  memory = found['arguments'] + found['outputs'] - found['aliased'] + found['temporary']
  row = case | {
    'error': '',
    'chips': found['chips'],
    'chip_gb': round(memory / 1e9, 3),
    'state_gb': round(found['arguments'] / 1e9, 3),
    'temporary_gb': round(found['temporary'] / 1e9, 3),
    'tflop_a_chip': round(found['flops'] / found['chips'] / 1e12, 2),
    'compile_seconds': found['compile_seconds'],
    'problems': '; '.join(found['problems']),
  }
  kernels = [
    case | {'kernel': name, 'times': times, 'operands': ' '.join(operands)}
    for name, operands, times in found['kernels']
  ]
  collectives = [
    case | {
      'kind': kind, 'group': group, 'times': times, 'megabytes': round(size / 1e6, 3),
      'operands': ' '.join(operands), 'results': ' '.join(results), 'place': place,
    }
    for kind, operands, results, group, size, place, times in found['collectives']
  ]  # fmt: skip
  row['communicated_gb'] = round(sum(x['megabytes'] * x['times'] for x in collectives) / 1e3, 3)
  collectives.sort(key=lambda x: -x['megabytes'] * x['times'])
  return {'step': [row], 'step_kernels': kernels, 'step_collectives': collectives}


def totals(kernels: list[dict], operators: list[dict]) -> list[dict]:
  """Bundles a token and head of whole passes, beside what they are to be compared with.

  Those are the bounds, the base model (the same kernels without the residual state) and the plain
  form: its arithmetic, its bytes, and the cycles that its bytes take at the chip's bandwidth.
  """
  index = ('topology', 'dtype', 'size', 'rule')
  groups, plain = {}, {}
  for row in kernels:
    if row['program'] == 'pallas' and row.get('bundles_a_token_and_head'):
      groups.setdefault(tuple(row[i] for i in index), {})[row['kernel']] = row
  for row in operators:
    if row['program'] == 'chunked':
      plain[(*(row[i] for i in index), row['pass'])] = row
  rows = []
  for key, group in groups.items():
    if not set(PARTS) <= set(group):
      continue
    row = dict(zip(index, key))
    units = int(group['forward']['matrix_units'])
    cycles = functools.partial(bound.memory_cycles, row['topology'].split(':')[0], units)
    for name, kernels_of in PARTS.items():
      parts = [group[x] for x in kernels_of if x in group]
      row[name] = round(sum(float(x['bundles_a_token_and_head']) for x in parts), 2)
      size = sum(float(x['hbm_bytes_a_token_and_head']) for x in parts)
      row |= {f'{name}_bytes': size, f'{name}_memory_bound': round(cycles(size), 2)}
      row[f'{name}_bound'] = float(group[name]['bound'])
    for name in ('forward', 'forward_backward'):
      found = plain.get((*key, name), {})
      for unit in ('flops', 'bytes'):
        row[f'chunked_{name}_{unit}'] = found.get(f'{unit}_a_token_and_head', '')
      size = row[f'chunked_{name}_bytes']
      row[f'chunked_{name}_memory_cycles'] = size and round(cycles(float(size)))
    rows.append(row | {name: group['forward'][name] for name in STAMP})
  by_key = {tuple(row[i] for i in index): row for row in rows}
  for row in rows:
    base = by_key.get((*(row[i] for i in index[:3]), BASE_MODEL.get(row['rule'])), {})
    passes = {name: (name,) for name in PARTS} | {'training': ('forward_saving', 'backward')}
    for name, parts in passes.items():
      ratio = sum(row[x] for x in parts) / sum(base[x] for x in parts) if base else ''
      row[f'{name}_over_base_model'] = ratio and round(ratio, 3)
  return rows


def _memory_folder():
  """The dumps are some hundred megabytes a case, and short-lived."""
  return '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
