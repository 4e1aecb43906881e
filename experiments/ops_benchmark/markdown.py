"""The speed suite as the tables of docs/gpu.md."""

NAMES = {'rdn': 'RDN', 'rla': 'RLA', 'gdn': 'GDN', 'simple_gla': 'simple GLA', 'flash': 'softmax'}
DIRECTIONS = ('forward', 'forward_backward')


def table(rows: list[dict], lengths: tuple[int, ...] = (2048, 8192, 32768), size: int = 128) -> str:
  """Markdown: milliseconds forward / forward+backward by length, and the most memory.

  Args:
    rows: of speed.csv.
    lengths: of a sequence, one column each.
    size: of a head.
  """
  found = {
    (r['operation'], r['implementation'], int(r['length']), r['direction']): r
    for r in rows
    if int(r['size']) == size
  }
  operations = list(NAMES)
  pairs = sorted({key[:2] for key in found if key[2] in lengths}, key=lambda pair: (
    operations.index(pair[0]), pair[1] != 'triton', pair[1]
  ))  # fmt: skip
  batches = {int(r['length']): r['batch'] for r in rows if r['direction'] in DIRECTIONS}
  lines = [
    ['', 'by', *(f'{batches[n]} x {n}' for n in lengths), 'memory'],
    ['---'] * (len(lengths) + 3),
  ]
  for operation, by in pairs:
    times = [
      ' / '.join(
        f'{float(found[operation, by, n, direction]["milliseconds"]):.2f}'
        if (operation, by, n, direction) in found else '–'
        for direction in DIRECTIONS
      )
      for n in lengths
    ]  # fmt: skip
    memory = [
      float(found[operation, by, n, 'forward_backward']['peak_over_tensors'])
      for n in lengths
      if (operation, by, n, 'forward_backward') in found
    ]
    lines.append([NAMES[operation], by, *times, f'{max(memory):.2f}' if memory else '–'])
  return _lines(lines)


def kernel_table(
  rows: list[dict], lengths: tuple[int, ...] = (2048, 8192), size: int = 128
) -> str:
  """Markdown: milliseconds of each Triton kernel in a call of forward and backward.

  Args:
    rows: of kernels.csv.
    lengths: of a sequence.
    size: of a head.
  """
  walks = ('forward_kernel', 'pair_kernel', 'base_part_kernel', 'residual_part_kernel')
  columns = {
    '`prepare`': ('prepare_kernel',), 'walk, saving': walks,
    '`sweep`': ('sweep_kernel',), '`queries`': ('queries_kernel',), '`keys`': ('keys_kernel',),
  }  # fmt: skip
  times = {}
  for r in sorted(rows, key=lambda r: (list(NAMES).index(r['operation']), int(r['length']))):
    is_timed = (r['direction'], r['implementation']) == ('forward_backward', 'triton')
    if is_timed and int(r['length']) in lengths and int(r['size']) == size:
      call = f'{NAMES[r["operation"]]}, {r["batch"]} x {r["length"]}'
      times.setdefault(call, {})[r['kernel']] = float(r['milliseconds'])
  lines = [['', *columns], ['---'] * (1 + len(columns))]
  for call, found in times.items():
    spent = (sum(found.get(kernel, 0) for kernel in kernels) for kernels in columns.values())
    lines.append([call, *(f'{x:.2f}' if x else '' for x in spent)])
  return _lines(lines)


def accuracy_table(rows: list[dict], dtype: str = 'bfloat16') -> str:
  """Markdown: the largest errors of each operation over all cases of one dtype, in per cent.

  Args:
    rows: of accuracy.csv.
    dtype: of q, k and v.
  """
  columns = {n: (n,) for n in ('o', 'base', 'residual', 'dq', 'dk', 'dv')}
  columns['gates'] = ('dbeta', 'dgamma', 'dlog_decay')
  lines = [['', *columns], ['---'] * (1 + len(columns))]
  for operation in dict.fromkeys(r['operation'] for r in rows):
    cases = [r for r in rows if (r['operation'], r['dtype']) == (operation, dtype)]
    largest = (
      max((float(r[n]) for r in cases for n in names if r.get(n)), default=None)
      for names in columns.values()
    )
    lines.append([NAMES[operation], *('' if x is None else f'{100 * x:.2f}' for x in largest)])
  return _lines(lines)


def rounding_table(rows: list[dict], size: int) -> str:
  """Markdown: errors of base and residual state in per cent, the mean and in brackets the largest.

  Args:
    rows: of state_rounding.csv.
    size: of a head.
  """
  found = {(r['variant'], int(r['kinds'])): r for r in rows if int(r['size']) == size}
  kinds = list(dict.fromkeys(n for _, n in found))
  lines = [['', *(f'{n} kind' + 's' * (n > 1) for n in kinds)], ['---'] * (1 + len(kinds))]
  names = [f'{state}_{x}' for x in ('mean', 'largest') for state in ('base', 'residual')]
  for variant in dict.fromkeys(variant for variant, _ in found):
    percents = ([f'{100 * float(found[variant, n][x]):.2f}' for x in names] for n in kinds)
    lines.append([variant, *('{} {} ({} {})'.format(*x) for x in percents)])
  return _lines(lines)


def _lines(lines):
  return '\n'.join('|' + '|'.join(f' {cell} ' for cell in line) + '|' for line in lines)
