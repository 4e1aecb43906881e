"""The totals as the table of docs/tpu.md."""

HEAD = (
  'TPU', 'rule', 'forward', 'saving', 'backward', 'over base', 'matrix', 'memory', '`chunked`'
)
PASSES = ('forward', 'forward_saving', 'backward')


def table(totals: list[dict], size: int = 128, dtype: str = 'bfloat16') -> str:
  """Markdown of the rows of one head size and type.

  Args:
    totals: rows of totals.csv, or of `measure.totals`.
    size: of a head.
    dtype: of q, k and v.
  """
  rows = [row for row in totals if (str(row['size']), row['dtype']) == (str(size), dtype)]
  rows.sort(key=lambda row: row['topology'])
  lines = [' | '.join(cells) for cells in (HEAD, *map(_cells, rows))]
  lines.insert(1, '|'.join(['---'] * len(HEAD)))
  return '\n'.join(f'| {line} |' if '---' not in line else f'|{line}|' for line in lines)


def _cells(row):
  def some(pattern, names, digits):
    found = [row[pattern.format(name)] for name in names]
    return ' / '.join(f'{float(x):.{digits}f}' for x in found if x != '') or '–'

  both = ('forward', 'backward')
  return [
    row['topology'].split(':')[0], row['rule'].upper(), *(some('{}', [x], 1) for x in PASSES),
    some('{}_over_base_model', (*both, 'training'), 2), some('{}_bound', both, 1),
    some('{}_memory_bound', both, 1),
    some('chunked_{}_memory_cycles', ('forward', 'forward_backward'), 0),
  ]  # fmt: skip
