"""Random calls of the TPU kernels, run in interpretation, against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np

from rla_jax.kernels.residual import tpu
from tests import oracle
from tests.errors import error as error

STATES = ('base', 'residual')
GATES = ('log_decay', 'beta', 'gamma')


def make_call(
  seed=0, *, batch=1, time=40, keys=1, heads=1, key_dim=8, value_dim=16, kind='normal', decay=3.0,
  strength=1.0, resets=False, segments=None, dtype=jnp.float32, **changes,
) -> oracle.Call:  # fmt: skip
  """A call whose arrays are exact in the types that the kernels take.

  kind: 'normal' keys; 'uniform' in (0, 1): correlated; 'near': almost the same key throughout.
  decay: log decay is uniform in (-decay, 0). strength: beta and gamma are uniform in (0, strength).
  segments: first tokens of documents, or None.
  """
  rng = np.random.default_rng(seed)
  normal = rng.standard_normal
  k = {
    'normal': lambda shape: normal(shape),
    'uniform': lambda shape: rng.uniform(0, 1, shape),
    'near': lambda shape: 1 + 0.02 * normal(shape),
  }[kind]((batch, time, keys, key_dim))
  q = normal(k.shape)
  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
  log_decay = -rng.uniform(0, decay, (batch, time, heads))
  if resets:
    log_decay[rng.uniform(size=log_decay.shape) < 0.15] = -np.inf
  ids = None
  if segments is not None:
    ids = np.searchsorted(segments, np.arange(time), side='right')[None].repeat(batch, axis=0)
    ids = ids - ids[:, :1]
  def gate():
    return rng.uniform(0, strength, (batch, time, heads))
  def state():
    return normal((batch, heads, key_dim, value_dim))
  call = oracle.Call(
    unit(q), unit(k), normal((batch, time, heads, value_dim)), log_decay, gate(), gate(), state(),
    state(), segment_ids=ids,
  ).replace(**changes)  # fmt: skip
  return call.replace(**{
    name: exact(x, dtype if name in 'qkv' else jnp.float32) for name, x in call.arrays().items()
  })


def exact(x, dtype):
  """float64 values that `dtype` represents."""
  return np.asarray(jnp.asarray(x, dtype), np.float64)


def cotangents(call: oracle.Call, dtype, seed=1) -> dict[str, np.ndarray]:
  """Random cotangents of everything that the call returns."""
  rng = np.random.default_rng(seed)
  found = {'o': exact(rng.standard_normal(call.v.shape), dtype)}
  for name in STATES if call.gamma is not None else STATES[:1]:
    found[name] = exact(rng.standard_normal(call.base.shape), jnp.float32)
  return found


def run(call: oracle.Call, dtype=jnp.float32, *, wanted=None, chunk_size=16, interpret=True):
  """(outputs, gradients or None) of the kernels by name; gradients if cotangents are `wanted`."""
  arrays = {
    name: jnp.asarray(x, dtype if name in 'qkv' else jnp.float32)
    for name, x in call.arrays().items()
  }
  segments = call.segment_ids
  segments = None if segments is None else jnp.asarray(segments, jnp.int32)

  def kernels(a):
    o, base, residual = tpu.residual_attention(
      a['q'], a['k'], a['v'], a['log_decay'], a['beta'], a.get('gamma'), a['base'],
      a.get('residual'), segments, update=call.update, clip=call.clip, readout=call.readout,
      chunk_size=chunk_size, interpret=interpret,
    )  # fmt: skip
    out = {'o': o, 'base': base, 'residual': residual}
    return {name: x for name, x in out.items() if x is not None}

  if wanted is None:
    return jax.jit(kernels)(arrays), None

  def both(arrays, cotangents):
    out, transpose = jax.vjp(kernels, arrays)
    return out, transpose({name: cotangents[name].astype(out[name].dtype) for name in out})[0]

  return jax.jit(both)(arrays, {name: jnp.asarray(x) for name, x in wanted.items()})


def assert_close(found, reference, bars):
  """Every array within its bar; says all that are not."""
  errors = {name: error(found[name], reference[name]) for name in reference}
  print(' '.join(f'{name} {value:.1e}' for name, value in errors.items()))
  wrong = {name: value for name, value in errors.items() if not value <= bars(name)}
  assert not wrong, f'RMS(error) / RMS(reference) over the bar: {wrong}'
