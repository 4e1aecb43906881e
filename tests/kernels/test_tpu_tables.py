"""The tables of the TPU report: of one commit, complete, and what the documentation says."""

import collections
import csv
import itertools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TABLES = ROOT / 'experiments/results/tpu_schedule'
sys.path.append(str(ROOT / 'experiments'))

from tpu_schedule import markdown, measure  # noqa: E402

CHIPS = ('v5e:2x2', 'v5p:2x2x1', 'v6e:2x2')
RULES = ('rla', 'rdn', 'gla', 'gdn')
KERNELS = ('pallas', 'decode')


def read(name):
  with (TABLES / f'{name}.csv').open(newline='') as file:
    return list(csv.DictReader(file))


def words(path):
  return ' '.join((ROOT / path).read_text(encoding='utf-8').split())


def test_all_rows_are_of_one_kernel():
  rows = [x for name in ('kernels', 'operators') for x in read(name) if x['program'] in KERNELS]
  (commit,) = {x['commit'] for x in rows}
  assert not commit.endswith('changed')


def test_every_kernel_compiles():
  """Whatever the head size, type, rule and chip: forward, both passes, one decode step."""
  compiled = {
    (x['topology'], x['rule'], x['size'], x['dtype'], x['pass'])
    for x in read('operators') if x['program'] in KERNELS and not x['error']
  }  # fmt: skip
  passes = ('forward', 'forward_backward', 'step')
  wanted = itertools.product(CHIPS, RULES, ('64', '128', '256'), ('bfloat16', 'float32'), passes)
  assert set(wanted) <= compiled


def test_totals_are_those_of_the_kernels():
  totals = measure.totals(read('kernels'), read('operators'))
  assert [{name: str(x) for name, x in row.items()} for row in totals] == read('totals')
  assert {(x['topology'], x['rule']) for x in totals} == set(itertools.product(CHIPS, RULES))


def test_the_page_has_the_table():
  assert markdown.table(read('totals')) in (ROOT / 'docs/tpu.md').read_text(encoding='utf-8')


@pytest.mark.parametrize('rule', ['rla', 'rdn'])
def test_the_readme_has_the_schedules_on_v5e(rule):
  (row,) = (x for x in read('totals') if (x['topology'], x['rule']) == ('v5e:2x2', rule))
  forward, backward = (f'{float(row[x]):.1f}' for x in ('forward', 'backward'))
  assert f'{forward} and {backward} bundles for {rule.upper()}' in words('README.md')


def test_a_training_step_fits_and_gathers_no_tokens():
  rows = read('step')
  assert {x['tensor'] for x in rows} == {'1', '4'}
  for row in rows:
    assert (row['topology'], row['time'], row['error'], row['problems']) == (
      'v5e:16x16', '4096', '', ''
    )  # fmt: skip
    assert float(row['chip_gb']) < 16
  exchanged = [x for x in read('step_collectives') if x['kind'] != 'all-reduce']
  assert {x['kind'] for x in exchanged} == {'all-gather', 'reduce-scatter'}
  assert not [x['results'] for x in exchanged if ',4096' in x['operands'] + x['results']]


def test_the_page_has_the_training_steps():
  traffic = collections.Counter()
  for x in read('step_collectives'):
    traffic[x['tensor'], x['kind']] += float(x['megabytes']) * int(x['times']) / 1e3
  kinds = ('all-gather', 'reduce-scatter', 'all-reduce')
  for row in read('step'):
    mesh = ', '.join(row[axis] for axis in ('data', 'fsdp', 'tensor'))
    figures = [float(row['chip_gb']), *(traffic[row['tensor'], kind] for kind in kinds)]
    assert f'| {mesh} | {" | ".join(f"{x:.1f}" for x in figures)} |' in words('docs/tpu.md')
