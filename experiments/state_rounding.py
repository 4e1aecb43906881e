"""Which rounding the final states of RDN owe their errors to, where keys are alike; on any machine.

    python experiments/state_rounding.py                       # 3 minutes
    python experiments/state_rounding.py --sizes=64 --kinds=1 --draws=2     # seconds

Walks the chunks as the Triton kernels do, in float64 but for what they round: states to bfloat16
where they are read, the errors that the inverse is applied to and what is written, each in one part
or with what that leaves in a second, the inverse, the prediction's matrix, the residual. Inputs are
those of the accuracy suite of benchmark_ops.py with keys that share 0.9 of one direction, or of one
of several that take turns at random. The reference is the same walk with nothing rounded.

  all      what the kernels round now: sums of the inverse down its columns are kept (`prepare`)
  free     the same, with each element of the inverse rounded to the nearest
  parts    `all`, with the errors in two parts
  free parts     both, as it was until commit b851198
  exact inverse  `free parts`, with the inverse not rounded at all

Prints a table in per cent, RMS(error) / RMS(state), and writes state_rounding.csv to --out.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ops_benchmark.problem import Problem, make_inputs
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

COLUMNS = [f'{state}_{x}' for state in ('base', 'residual') for x in ('mean', 'largest')]
CHUNK, SHARE, LEAST = 32, 0.9, 0.05  # LEAST as in kernels.residual.gpu.prepare
# inverse: '', 'free' or 'kept'; whether errors are rounded to one part, and everything else is.
VARIANTS = {
  'all': ('kept', True), 'free': ('free', True), 'parts': ('kept', False),
  'free parts': ('free', False), 'exact inverse': ('', False),
}  # fmt: skip


def low(x, dtype=jnp.bfloat16):
  """Rounded to 16 bits."""
  return x.astype(dtype).astype(x.dtype)


def two_parts(x):
  """Rounded, with what that leaves in 16 bits of its own."""
  return low(x) + low(x - low(x))


def draw(size: int, kinds: int, seed: int, length: int) -> dict[str, np.ndarray]:
  """Inputs [T, H, ...] and initial states [H, K, V] in float64, of values that bfloat16 has."""
  inputs = make_inputs(Problem('rdn', 'forward', 1, length, 2, size), seed)
  rng = np.random.default_rng(seed + 1)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  common = unit(rng.standard_normal((kinds, 2, size)))[rng.integers(kinds, size=length)]
  inputs['k'] = unit((1 - SHARE) * inputs['k'] + SHARE * common)
  found = {n: x[0].astype(np.float64) for n, x in inputs.items()}
  found |= {n: np.asarray(low(jnp.asarray(found[n]))) for n in 'kv'}
  found['base'], found['residual'] = 0.1 * rng.standard_normal((2, 2, size, size))
  return found


def inverse(N):
  """(I + N)^-1 of a strictly lower triangular N [H, C, C], row by row."""
  identity = jnp.broadcast_to(jnp.eye(CHUNK), N.shape)
  row = lambda i, X: X.at[:, i].add(-jnp.einsum('hc,hcd->hd', N[:, i], X))  # noqa: E731
  return jax.lax.fori_loop(1, CHUNK, row, identity)


def kept(X, weights):
  """X rounded with its weighted sums down the columns as they were: `store_inverse`."""
  gain = jnp.einsum('hi,hij->hj', weights, low(X) - X)
  squares = weights**2
  change = -gain / (jnp.cumsum(squares, -1) - squares + LEAST)
  return low(jnp.triu(weights[:, :, None] * change[:, None], 1) + low(X))


@functools.partial(jax.jit, static_argnames='variant')
def walk(inputs: dict, variant: str | None = None) -> tuple[jax.Array, jax.Array]:
  """Final states by the recurrence's equations (6) to (10), in one of VARIANTS or exactly."""
  stored, is_one_part = VARIANTS[variant] if variant else ('', False)
  rounded = low if variant else lambda x: x
  both = two_parts if variant else lambda x: x
  errors = low if is_one_part else both

  def solved(A, exact, gate, to_end):
    X = inverse(A * gate[:, None])
    X = {'': lambda: X, 'free': lambda: low(X), 'kept': lambda: kept(X, to_end * gate)}[stored]()
    return X @ errors(exact)

  def chunk(states, x):
    S, R = states
    k, v, beta, gamma = x['k'], x['v'], x['beta'], x['gamma']
    G = jnp.cumsum(x['log_decay'], -1)
    before = G - x['log_decay']
    gram = jnp.einsum('hik,hjk->hij', k, k)
    A = jnp.tril(jnp.exp(jnp.minimum(G[:, :, None] - G[:, None], 0)) * gram, -1)
    P = jnp.tril(jnp.exp(jnp.minimum(before[:, :, None] - G[:, None], 0)) * gram, -1)
    into, to_end, all_ = jnp.exp(G), jnp.exp(G[:, -1:] - G), jnp.exp(G[:, -1])[:, None, None]

    def write(M, F, gate):
      return all_ * M + jnp.einsum('hck,hcv->hkv', k, both((to_end * gate)[..., None] * F))

    X = k @ rounded(S)
    exact = v - into[..., None] * X
    prediction = rounded(jnp.einsum('hij,hj,hjl->hil', P, beta, inverse(A * beta[:, None])))
    r = v - jnp.exp(before)[..., None] * X - prediction @ rounded(exact)
    r = jnp.clip(r, -1, 1)
    r = low(r, jnp.float16) if variant else r
    S = write(S, solved(A, exact, beta, to_end), beta)
    exact = r - into[..., None] * (k @ rounded(R))
    R = write(R, solved(A, exact, gamma, to_end), gamma)
    return (S, R), None

  tokens = {n: jnp.asarray(inputs[n]) for n in ('k', 'v', 'log_decay', 'beta', 'gamma')}
  tokens = {n: jnp.swapaxes(x.reshape(-1, CHUNK, *x.shape[1:]), 1, 2) for n, x in tokens.items()}
  return jax.lax.scan(chunk, (inputs['base'], inputs['residual']), tokens)[0]


def errors_of(size: int, kinds: int, seed: int, length: int) -> dict[str, np.ndarray]:
  """Relative errors of both states by variant."""
  with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
    inputs = draw(size, kinds, seed, length)
    exact = jax.tree.map(np.asarray, walk(inputs))
    return {
      variant: np.array([
        np.sqrt(np.mean((np.asarray(x) - y) ** 2) / np.mean(y**2))
        for x, y in zip(walk(inputs, variant), exact, strict=True)
      ])
      for variant in VARIANTS
    }  # fmt: skip


def table(rows: list[dict], size: int) -> str:
  """Markdown of the rows of one size: means of base and residual state, largest in brackets."""
  rows = [r for r in rows if int(r['size']) == size]
  kinds = list(dict.fromkeys(int(r['kinds']) for r in rows))
  lines = [['', *(f'{n} kind' + 's' * (n > 1) for n in kinds)], ['---'] * (1 + len(kinds))]
  for variant in VARIANTS:
    line = [variant]
    for n in kinds:
      (row,) = (r for r in rows if (int(r['kinds']), r['variant']) == (n, variant))
      percent = {name: f'{100 * float(row[name]):.2f}' for name in COLUMNS}
      cell = '{base_mean} {residual_mean} ({base_largest} {residual_largest})'
      line.append(cell.format(**percent))
    lines.append(line)
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def main(_):
  """Measures, prints and writes."""
  sizes, all_kinds = numbers(SIZES), numbers(KINDS)
  if LENGTH.value % CHUNK:
    raise ConfigError(f'--length is {LENGTH.value}; expected a multiple of {CHUNK}')
  source = {'length': LENGTH.value, 'draws': DRAWS.value, 'commit': commit() or 'unknown',
            'date': today(), 'jax': jax.__version__}  # fmt: skip
  rows = []
  print('per cent: base mean, largest; residual mean, largest; share of draws over 0.5')
  for size in sizes:
    for kinds in all_kinds:
      seeds = tqdm(range(DRAWS.value), f'heads of {size}, {kinds} kinds', leave=False)
      found = [errors_of(size, kinds, seed, LENGTH.value) for seed in seeds]
      for variant in VARIANTS:
        errors = np.array([x[variant] for x in found])
        figures = np.stack([errors.mean(0), errors.max(0)], 1).ravel()
        row = {'size': size, 'kinds': kinds, 'variant': variant}
        row |= {name: f'{x:.2e}' for name, x in zip(COLUMNS, figures, strict=True)}
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
