"""Which rounding the final states of RDN owe their errors to, where keys are alike; on any machine.

    python experiments/state_rounding.py                       # 3 minutes
    python experiments/state_rounding.py --sizes=64 --kinds=1 --draws=2     # seconds

Walks the chunks in float64, but rounds what the Triton kernels round (`ops_benchmark/rounding.py`).
Inputs are those of the accuracy suite of benchmark_ops.py with keys that share 0.9 of one
direction, or of one of several that take turns at random. The reference is the same walk with
nothing rounded.

  all      what the kernels round now: sums of the inverse down its columns are kept (`prepare`)
  free     the same, with each element of the inverse rounded to the nearest
  parts    `all`, with the errors in two parts
  free parts     both, as it was until commit b851198
  exact inverse  `free parts`, with the inverse not rounded at all

Prints a table in per cent, RMS(error) / RMS(state), and writes state_rounding.csv to --out.
"""

import pathlib

import jax
import numpy as np
from absl import flags
from ops_benchmark import rounding
from tqdm import tqdm

from rla_jax.evaluation.provenance import commit, today
from rla_jax.evaluation.results import write_rows
from rla_jax.training import ConfigError
from rla_jax.training.command_line import numbers, run

SIZES = flags.DEFINE_list('sizes', ['64', '128', '256'], 'key and value sizes of a head')
KINDS = flags.DEFINE_list('kinds', ['1', '2', '16'], 'directions of which keys share one')
DRAWS = flags.DEFINE_integer('draws', 20, 'inputs, of two heads each', lower_bound=1)
LENGTH = flags.DEFINE_integer('length', 2048, 'tokens, whole chunks of 32', lower_bound=32)
OUT = flags.DEFINE_string('out', 'runs/state_rounding', 'folder of the CSV file')


def main(_):
  """Measures, prints and writes."""
  sizes, all_kinds = numbers(SIZES), numbers(KINDS)
  if LENGTH.value % rounding.CHUNK:
    raise ConfigError(f'--length is {LENGTH.value}; expected a multiple of {rounding.CHUNK}')
  source = {'length': LENGTH.value, 'draws': DRAWS.value, 'commit': commit() or 'unknown',
            'date': today(), 'jax': jax.__version__}  # fmt: skip
  rows = []
  print('per cent: base mean, largest; residual mean, largest; share of draws over 0.5')
  for size in sizes:
    for kinds in all_kinds:
      seeds = tqdm(range(DRAWS.value), f'heads of {size}, {kinds} kinds', leave=False)
      found = [rounding.errors_of(size, kinds, seed, LENGTH.value) for seed in seeds]
      for variant in rounding.VARIANTS:
        errors = np.array([x[variant] for x in found])
        figures = np.stack([errors.mean(0), errors.max(0)], 1).ravel()
        row = {'size': size, 'kinds': kinds, 'variant': variant}
        row |= {name: f'{x:.2e}' for name, x in zip(rounding.COLUMNS, figures, strict=True)}
        row['over'] = float(np.mean(errors.max(1) > 0.005))
        rows.append(row | source)
        figures = ' '.join(f'{100 * x:.2f}' for x in figures)
        print(f'{size:4} {kinds:3} {variant:14} {figures} {row["over"]:.2f}', flush=True)
  out = pathlib.Path(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  write_rows(out / 'state_rounding.csv', rows)
  print(f'written to {out / "state_rounding.csv"}')


if __name__ == '__main__':
  run(main)
