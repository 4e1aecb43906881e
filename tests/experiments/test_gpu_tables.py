"""The GPU figures of the documentation are those of the benchmark's tables."""

import csv
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'experiments'))

from ops_benchmark import markdown  # noqa: E402

ERRORS = ('o', 'base', 'residual', 'dq', 'dk', 'dv', 'dbase', 'dresidual', 'dbeta', 'dgamma',
          'dlog_decay')  # fmt: skip


def results(name):
  with (ROOT / 'experiments/results' / name).open(newline='') as file:
    return list(csv.DictReader(file))


def speed():
  return results('speed.csv')


def in_the_table():
  return [
    r for r in speed() if r['direction'] != 'decode' and r['length'] in ('2048', '8192', '32768')
  ]


def words(path):
  return ' '.join((ROOT / path).read_text(encoding='utf-8').split())


def milliseconds(operation, implementation, direction, length):
  (row,) = (
    r for r in speed()
    if (r['operation'], r['implementation'], r['direction'], r['length'], r['size'])
    == (operation, implementation, direction, str(length), '128')
  )  # fmt: skip
  return float(row['milliseconds'])


def test_the_page_has_the_tables():
  page = (ROOT / 'docs/gpu.md').read_text(encoding='utf-8')
  for size in {int(r['size']) for r in speed()}:
    assert markdown.table(speed(), size=size) in page


def test_the_page_has_the_ratios_to_the_kernels_of_one_state():
  ratios = []
  for ours, theirs in (('rdn', 'gdn'), ('rla', 'simple_gla')):
    for direction in ('forward', 'forward_backward'):
      pairs = [
        [milliseconds(*by, direction, length) for by in ((ours, 'triton'), (theirs, 'fla'))]
        for length in (2048, 8192, 32768)
      ]
      ratios.append([x / y for x, y in pairs])
  assert max(map(max, ratios)) <= 1
  rdn, rdn_both, rla, rla_both = ('{:.2f}, {:.2f} and {:.2f} times'.format(*x) for x in ratios)
  text = words('docs/gpu.md')
  assert f'RDN takes {rdn} its Gated DeltaNet forward and {rdn_both} forward and backward' in text
  assert f'RLA {rla} its simple GLA forward and {rla_both} forward and backward' in text


def test_the_page_has_what_large_heads_took_before():
  """Forward with both states in one program, then both passes with a state every 32 tokens."""
  times = {}
  for r in results('large_heads_before.csv'):  # the older row of a kind comes first
    key = (r['operation'], r['direction'], r['length'])
    times.setdefault(key, []).append('{:.2f}'.format(float(r['milliseconds'])))

  def pair(operation, direction, index):
    return ' and '.join(times[operation, direction, n][index] for n in ('2048', '8192'))

  text = words('docs/gpu.md')
  rdn, rla = (pair(operation, 'forward', 0) for operation in ('rdn', 'rla'))
  assert f"RDN's forward pass took {rdn} ms at 16 x 2048 and 4 x 8192, and RLA's {rla}" in text
  rdn, rla, gdn = (pair(operation, 'forward_backward', -1) for operation in ('rdn', 'rla', 'gdn'))
  assert f'forward and backward RDN took {rdn} ms, RLA {rla}, GDN {gdn}' in text


def test_the_page_has_the_times_of_the_kernels():
  rows = results('kernels.csv')
  assert markdown.kernel_table(rows) in (ROOT / 'docs/gpu.md').read_text(encoding='utf-8')
  assert all(f'commit {row["commit"]}' in words('docs/gpu.md') for row in rows)


def test_the_page_names_every_commit_of_the_table():
  """For the peers the commit beside which they ran."""
  assert all(f'commit {r["commit"]}' in words('docs/gpu.md') for r in in_the_table())


def test_the_readme_names_the_commit_of_its_times():
  (commit,) = {
    r['commit'] for r in in_the_table()
    if r['implementation'] == 'triton' and r['length'] == '2048'
    and r['operation'] in ('rdn', 'gdn') and r['size'] == '128'
  }  # fmt: skip
  assert f'commit {commit}' in words('README.md')


def test_the_readme_has_the_times():
  def pair(operation, implementation):
    times = (
      milliseconds(operation, implementation, x, 2048) for x in ('forward', 'forward_backward')
    )
    return '{:.2f} and {:.2f} ms'.format(*times)

  assert f'{pair("rdn", "triton")} for RDN, {pair("gdn", "triton")} for Gated' in words('README.md')


def test_decode_moves_the_states_at_the_copy_rate():
  text = words('docs/gpu.md')
  (row,) = (
    r for r in speed() if (r['operation'], r['direction'], r['implementation'])
    == ('rdn', 'decode', 'triton')
  )  # fmt: skip
  assert f'{float(row["milliseconds"]):.3f} ms a token for RDN' in text
  assert f'{float(row["share_of_copy_bandwidth"]):.0%}'.replace('%', ' %') in text


def test_the_page_has_the_largest_errors():
  page = (ROOT / 'docs/gpu.md').read_text(encoding='utf-8')
  assert markdown.accuracy_table(results('accuracy.csv')) in page


def test_the_page_tells_every_case_that_is_over_the_bar():
  text = words('docs/gpu.md')
  for row in results('accuracy.csv') + results('accuracy_before.csv'):
    over = set(ERRORS) & set(row['over_the_bar'].split())
    assert (row['passed'] == 'True') == (not over), row
    for name in over:
      assert f'{100 * float(row[name]):.2g} %' in text, (row['operation'], row['size'], name)


def test_the_page_has_what_the_states_errors_are_made_of():
  text = (ROOT / 'docs/gpu.md').read_text(encoding='utf-8')
  assert markdown.rounding_table(results('state_rounding.csv'), 128) in text
