"""Which implementation serves which backbone, and how exactly. No empty cell.

    python experiments/support_table.py                    # the plain forms on this machine's CPU
    python experiments/support_table.py --interpret        # the kernels too, through interpreters

A row is a combination of update, decay and residual; a column an implementation. A cell holds the
worst error of the values (o and final states) and of the gradients (every argument, initial states
included), or the letter of the reason why the implementation does not serve.

The error is RMS(difference) / RMS(oracle). The oracle is the recurrence in float64, one token at a
time: the definition `implementation="reference"` in double precision on the CPU, which the tests
hold, row by row, to an independent numpy recurrence and its hand-written gradient at 1e-12.

Writes support_table.csv to --out: a line a cell with date, commit, versions and device. Leaves with
status 1 if an error exceeds its bar, 2e-5 in float32.
"""

import csv
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import pathlib
import platform
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from rla_jax import ops
from rla_jax.evaluation.provenance import commit
from rla_jax.ops.validate import canonicalise
from rla_jax.training import ConfigError
from rla_jax.training.command_line import choices, run

FLAGS = flags.FLAGS
LENGTH = flags.DEFINE_integer('length', 150, 'tokens of a sequence')
KEY_DIM = flags.DEFINE_integer('key_dim', 16, 'key size of a head')
VALUE_DIM = flags.DEFINE_integer('value_dim', 32, 'value size of a head')
IMPLEMENTATIONS = flags.DEFINE_list(
  'implementations', list(ops.IMPLEMENTATIONS), ', '.join(ops.IMPLEMENTATIONS)
)
INTERPRET = flags.DEFINE_boolean(
  'interpret', False, 'run kernels that have no device through their interpreters (slow)'
)
OUT = flags.DEFINE_string('out', 'runs/support_table', 'folder of the CSV file')

OPERATORS = {'additive': ops.residual_linear_attention, 'delta': ops.residual_delta_rule}
DECAYS = ('none', 'fixed', 'scalar', 'channel')
PACKAGES = {'triton': 'rla_jax.kernels.residual.gpu', 'pallas': 'rla_jax.kernels.residual.tpu'}
BAR = 2e-5


@dataclasses.dataclass(frozen=True)
class Row:
  """A backbone: its update rule, its decay, and whether a residual state comes on top."""

  update: str
  decay: str
  residual: bool


@dataclasses.dataclass(frozen=True)
class Cell:
  """Worst errors and where they are; or why there are none."""

  value_error: float | None = None
  value_name: str = ''
  gradient_error: float | None = None
  gradient_name: str = ''
  how: str = ''
  reason: str = ''

  @property
  def text(self) -> str:
    """As the table shows it."""
    return f'{self.value_error:.0e} / {self.gradient_error:.0e}'

  @property
  def exact(self) -> bool:
    """Within the bar, or not to be measured."""
    return bool(self.reason) or max(self.value_error, self.gradient_error) <= BAR


def rows() -> list[Row]:
  """All combinations."""
  return [Row(*parts) for parts in itertools.product(OPERATORS, DECAYS, (False, True))]


def problem(row: Row, length: int, key_dim: int, value_dim: int) -> dict[str, np.ndarray]:
  """Arguments of a row by name, in float32: unit keys, one key head for two value heads."""
  rng = np.random.default_rng(0)
  B, T, G, H, K, V = 2, length, 1, 2, key_dim, value_dim

  def unit(*shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  found = {'q': unit(B, T, G, K), 'k': unit(B, T, G, K), 'v': rng.normal(size=(B, T, H, V))}
  if row.decay == 'fixed':
    # RetNet's decays.
    per_head = np.log(1 - 2.0 ** (-5 - np.arange(H)))
    found['log_decay'] = np.broadcast_to(per_head, (B, T, H))
  elif row.decay != 'none':
    shape = (B, T, H, K) if row.decay == 'channel' else (B, T, H)
    found['log_decay'] = -0.1 * rng.exponential(size=shape)
  found['beta'] = rng.uniform(0.1, 0.9, (B, T, H))
  found['base'] = rng.normal(size=(B, H, K, V))
  if row.residual:
    found['gamma'] = rng.uniform(0.1, 0.9, (B, T, H))
    found['residual'] = rng.normal(size=(B, H, K, V))
  return {name: x.astype(np.float32) for name, x in found.items()}


def evaluate(function, arrays: dict, dtype) -> dict[str, np.ndarray]:
  """Values of a function of named arrays, and gradients of a random projection of them."""

  @jax.jit
  def both(arrays):
    out, pull = jax.vjp(function, arrays)
    rng = np.random.default_rng(1)
    projection = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in sorted(out.items())}
    return out, pull({n: jnp.asarray(x, out[n].dtype) for n, x in projection.items()})[0]

  out, gradients = both({name: jnp.asarray(x, dtype) for name, x in arrays.items()})
  named = {**out, **{f'd{name}': x for name, x in gradients.items()}}
  return {name: np.asarray(x, np.float64) for name, x in named.items()}


def oracle(row: Row, arrays: dict) -> dict[str, np.ndarray]:
  """What `evaluate` should find: the definition in double precision, on the CPU."""
  with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
    return evaluate(functools.partial(call, row, implementation='reference'), arrays, jnp.float64)


def call(row: Row, arrays: dict, **options) -> dict[str, jax.Array]:
  """Calls the row's operator: outputs by name."""
  arguments, state = _arguments(arrays)
  o, state = OPERATORS[row.update](**arguments, initial_state=state, **options)
  return _outputs(o, *state)


def interpret(row: Row, arrays: dict, package: str) -> dict[str, jax.Array]:
  """The same through the interpreter of a kernel package."""
  (arguments, state), module = _arguments(arrays), importlib.import_module(package)
  arguments = {'log_decay': None, 'gamma': None} | arguments
  inputs, options = canonicalise(
    row.update, **arguments, clip=1.0, initial_state=state, segment_ids=None, readout='gated',
    chunk_size=None,
  )  # fmt: skip
  *tokens, state, segments = inputs
  return _outputs(*module.residual_attention(
    *tokens, *state, segments, update=row.update, clip=options.clip, readout=options.readout,
    interpret=True,
  ))  # fmt: skip


def measure(row: Row, name: str, arrays: dict, want: dict, interpreted: bool) -> Cell:
  """Runs one implementation on one row."""
  arguments, state = _arguments(arrays)
  reason = ops.explain_implementations(
    OPERATORS[row.update], **arguments, initial_state=state
  )[name]
  how = jax.default_backend()
  function = functools.partial(call, row, implementation=name)
  if reason and interpreted and name in PACKAGES:
    reason = importlib.import_module(PACKAGES[name]).unsupported(
      update=row.update, key_dim=arrays['k'].shape[-1], value_dim=arrays['v'].shape[-1],
      dtype=jnp.float32, channel_decay=row.decay == 'channel', readout='gated',
      residual=row.residual,
    )  # fmt: skip
    how = 'interpreter'
    function = functools.partial(interpret, row, package=PACKAGES[name])
  if reason:
    return Cell(reason=reason)
  got = evaluate(function, arrays, jnp.float32)
  errors = {name: _error(got[name], want[name]) for name in want}
  values = {n: e for n, e in errors.items() if n in ('o', 'base', 'residual')}
  gradients = {n: e for n, e in errors.items() if n not in values}
  value, gradient = (max(found, key=found.get) for found in (values, gradients))
  return Cell(values[value], value, gradients[gradient], gradient, how)


def render(table: dict[Row, dict[str, Cell]]) -> str:
  """The table as text, the reasons below it."""
  names = list(next(iter(table.values())))
  letters = {}
  lines = [['update', 'decay', 'residual', *names]]
  for row, cells in table.items():
    texts = []
    for cell in cells.values():
      if cell.reason:
        letter = letters.setdefault(cell.reason, f'({chr(ord("a") + len(letters))})')
      texts.append(letter if cell.reason else cell.text + ('' if cell.exact else ' !'))
    lines.append([row.update, row.decay, 'on' if row.residual else 'off', *texts])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  padded = [[x.ljust(w) for x, w in zip(line, widths, strict=True)] for line in lines]
  text = ['  '.join(line).rstrip() for line in padded]
  notes = ['', 'error of values / of gradients (worst tensor); ! above the bar']
  for reason, letter in letters.items():
    notes += textwrap.wrap(f'{letter} {reason}', 98, subsequent_indent='    ')
  return '\n'.join(text + notes)


def write_csv(path: pathlib.Path, table: dict[Row, dict[str, Cell]]):
  """A line a cell."""
  path.parent.mkdir(parents=True, exist_ok=True)
  about = {
    'length': LENGTH.value, 'key_dim': KEY_DIM.value, 'value_dim': VALUE_DIM.value,
    'dtype': 'float32', 'date': datetime.date.today().isoformat(), 'commit': commit() or 'unknown',
    'jax': jax.__version__, 'python': platform.python_version(),
    'device': jax.devices()[0].device_kind, 'command': ' '.join(['python', *sys.argv]),
  }  # fmt: skip
  lines = [
    {**dataclasses.asdict(row), 'implementation': name, **dataclasses.asdict(cell), **about}
    for row, cells in table.items()
    for name, cell in cells.items()
  ]
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, lines[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)


def _arguments(arrays):
  arrays = dict(arrays)
  state = ops.ResidualState(arrays.pop('base'), arrays.pop('residual', None))
  return arrays, state


def _outputs(o, base, residual):
  found = {'o': o, 'base': base, 'residual': residual}
  return {name: x for name, x in found.items() if x is not None}


def _error(got, want):
  return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def main(_):
  """Fills the table, prints it, writes it."""
  choices(IMPLEMENTATIONS)
  wanted = INTERPRET.value and 'triton' in IMPLEMENTATIONS.value
  if wanted and not importlib.util.find_spec('triton'):
    raise ConfigError("--interpret needs Triton: pip install -e '.[test]'")
  table = {row: {} for row in rows()}
  work = list(itertools.product(table, IMPLEMENTATIONS.value))
  with tqdm(work, unit='cell', disable=None) as progress:
    for row, name in progress:
      progress.set_postfix_str(f'{row.update}, {row.decay} decay, {name}')
      arrays = problem(row, LENGTH.value, KEY_DIM.value, VALUE_DIM.value)
      if not table[row]:
        want = oracle(row, arrays)
      table[row][name] = measure(row, name, arrays, want, INTERPRET.value)
  path = pathlib.Path(OUT.value) / 'support_table.csv'
  write_csv(path, table)
  print(render(table))
  print(f'written to {path}')
  if not all(cell.exact for cells in table.values() for cell in cells.values()):
    sys.exit(f'an error is above the bar of {BAR:.0e}')


if __name__ == '__main__':
  run(main)
