"""Runs an implementation on a `Call` and measures it against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rla_jax import ops
from tests import oracle
from tests.errors import cosine as cosine
from tests.errors import error as error
from tests.oracle import Call

OPERATORS = {'additive': ops.residual_linear_attention, 'delta': ops.residual_delta_rule}
_LOW = {
  **dict.fromkeys(('o', 'base', 'residual'), 5e-3),
  **dict.fromkeys(('dq', 'dk', 'dv', 'dbase', 'dresidual'), 8e-3),
  **dict.fromkeys(('dbeta', 'dgamma', 'dlog_decay'), 2e-2),
}
BARS = {
  'float64': dict.fromkeys(_LOW, 1e-12),
  'float32': dict.fromkeys(_LOW, 2e-5),
  'bfloat16': _LOW,
  'float16': _LOW,
}


@functools.cache
def compiled(implementation, update, clip, readout, chunk_size=None):
  """A jitted (arrays, segment_ids, cotangents) -> (outputs, gradients); cached by its options."""

  def run(arrays, segment_ids):
    return outputs(
      OPERATORS[update], arrays, segment_ids, clip=clip, readout=readout, chunk_size=chunk_size,
      implementation=implementation,
    )  # fmt: skip

  @jax.jit
  def both(arrays, segment_ids, cotangents):
    out, pull = jax.vjp(lambda a: run(a, segment_ids), arrays)
    return out, pull(jax.tree.map(lambda c, o: c.astype(o.dtype), cotangents, out))[0]

  return both


def outputs(operator, arrays, segment_ids=None, **options) -> dict[str, jax.Array]:
  """Calls an operator with arrays by name: {'o': ..., 'base': ..., 'residual': ...}."""
  arrays = dict(arrays)
  base, residual = arrays.pop('base', None), arrays.pop('residual', None)
  if base is not None:
    options['initial_state'] = ops.ResidualState(base, residual)
  o, state = operator(**arrays, segment_ids=segment_ids, **options)
  found = {'o': o, 'base': state.base, 'residual': state.residual}
  return {name: x for name, x in found.items() if x is not None}


def measured(call: Call, cotangents, implementation: str, chunk_size: int | None = None) -> dict:
  """Outputs and gradients of an implementation: {'o': ..., 'dq': ...}, as float64 numpy."""
  run = compiled(implementation, call.update, call.clip, call.readout, chunk_size)
  arrays = {name: jnp.asarray(x) for name, x in call.arrays().items()}
  ids = None if call.segment_ids is None else jnp.asarray(call.segment_ids)
  out, grads = run(arrays, ids, {name: jnp.asarray(x) for name, x in cotangents.items()})
  named = {**out, **{f'd{name}': x for name, x in grads.items()}}
  return {name: np.asarray(x, np.float64) for name, x in named.items()}


def expected(call: Call, cotangents, mask=None) -> dict[str, np.ndarray]:
  """What `measured` should give, from the oracle."""
  out = oracle.recurrence(call)
  out.pop('innovation', None)
  grads = oracle.gradients(call, cotangents, mask)
  return {**out, **{f'd{name}': x for name, x in grads.items()}}


def assert_within(got: dict, want: dict, bars: dict[str, float]):
  """Fails with every tensor's name and error if one of them is above its bar, or is missing."""
  assert set(got) == set(want), f'{sorted(got)} differ from {sorted(want)}'
  errors = {name: error(got[name], want[name]) for name in want}
  table = '\n'.join(f'  {name:12} {e:9.2e}  (bar {bars[name]:.0e})' for name, e in errors.items())
  assert all(e <= bars[name] for name, e in errors.items()), f'errors:\n{table}'
