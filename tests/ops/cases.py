"""The one list of cases that every implementation has to pass, kernels included.

A case changes a typical call: sizes, inputs or options. Kernels that need other sizes ask for them:
`case.call('delta', K=64, V=128)`. Inputs are float32 numbers (or of a narrower dtype, on request),
so that the oracle sees exactly what the implementation sees.
"""

import dataclasses
import functools
from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests import oracle
from tests.oracle import Call

UPDATES = ('additive', 'delta')
SIZES = {'B': 2, 'T': 75, 'G': 2, 'H': 2, 'K': 8, 'V': 12}
# How near to the clip an innovation may come: a computation whose error is less cannot disagree
# about the mask, and gradients can be held to rounding.
MARGINS = {'float32': 1e-4, 'bfloat16': 0.03, 'float16': 0.01}


@dataclasses.dataclass(frozen=True)
class Case:
  """One case: `call` builds its arguments.

  Attributes:
    name: what it is about; the test's id.
    sizes: those that differ from SIZES.
    change: from a generator and the typical call to this case's call.
  """

  name: str
  sizes: dict[str, int] = dataclasses.field(default_factory=dict)
  change: Callable[[np.random.Generator, Call], Call] = lambda rng, call: call

  def call(self, update: str, dtype: str = 'float32', **sizes: int) -> Call:
    """Arguments of the case for 'additive' or 'delta'; q, k, v are rounded to `dtype`."""
    key = tuple(sorted({**SIZES, **self.sizes, **sizes}.items()))
    return _build(self.change, update, dtype, key)


def cotangents(call: Call) -> dict[str, np.ndarray]:
  """What to pull back through o and both final states: normal numbers, in v's dtype for o."""
  rng = np.random.default_rng(7)
  B, _T, H, V = call.v.shape
  state = (B, H, call.k.shape[-1], V)
  found = {
    'o': rng.normal(size=call.v.shape).astype(call.v.dtype),
    'base': rng.normal(size=state).astype(np.float32),
  }
  if call.gamma is not None:
    found['residual'] = rng.normal(size=state).astype(np.float32)
  return found


@functools.cache
def _build(change, update, dtype, sizes):
  rng = np.random.default_rng(len(sizes) + dict(sizes)['T'])
  call = dataclasses.replace(change(rng, typical(rng, **dict(sizes))), update=update)
  call = rounded(call, getattr(ml_dtypes, dtype, None) or np.dtype(dtype))
  return away_from_clip(call, MARGINS[dtype])


def typical(rng: np.random.Generator, B, T, G, H, K, V) -> Call:
  """A layer's inputs: unit keys, decays near 1, gates in (0, 1), states of an earlier piece."""
  return Call(
    q=unit(rng.normal(size=(B, T, G, K))),
    k=unit(rng.normal(size=(B, T, G, K))),
    v=rng.normal(size=(B, T, H, V)),
    log_decay=-0.1 * rng.exponential(size=(B, T, H)),
    beta=rng.uniform(0.1, 0.9, (B, T, H)),
    gamma=rng.uniform(0.1, 0.9, (B, T, H)),
    base=rng.normal(size=(B, H, K, V)),
    residual=rng.normal(size=(B, H, K, V)),
  )


def unit(x: np.ndarray) -> np.ndarray:
  """x over its L2 norm along the last axis."""
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def away_from_clip(call: Call, margin: float) -> Call:
  """The call with values moved until no innovation lies within `margin` of the clip."""
  if call.gamma is None or call.clip is None or not call.v.size:
    return call
  for _ in range(200):
    d = oracle.recurrence(call)['innovation']
    gap = np.abs(d) - call.clip
    near = np.abs(gap) < margin
    if not near.any():
      return call
    wanted = np.where(gap < 0, -2, 2) * margin
    v = call.v.astype(np.float64) + np.where(near, np.sign(d) * (wanted - gap), 0)
    call = call.replace(v=v.astype(call.v.dtype))
  raise AssertionError('values near the clip remain; the case is too tight for this margin')


def rounded(call: Call, dtype) -> Call:
  """The call with q, k, v in a dtype, and gates and states in float32."""
  changes = {n: x.astype(dtype if n in 'qkv' else np.float32) for n, x in call.arrays().items()}
  return call.replace(**changes)


def _options(**options):
  return lambda rng, call: call.replace(**options)


def _log_decay(draw):
  return lambda rng, call: call.replace(log_decay=draw(rng, call.log_decay.shape))


def _channel(draw):
  def change(rng, call):
    return call.replace(log_decay=draw(rng, call.log_decay.shape + call.k.shape[-1:]))

  return change


def _chain(*changes):
  def change(rng, call):
    for one in changes:
      call = one(rng, call)
    return call

  return change


def _mild(rng, shape):
  return -0.1 * rng.exponential(size=shape)


def _strong(rng, shape):
  return rng.uniform(-3, 0, shape)


def _resets(rng, shape):
  return np.where(rng.random(shape) < 0.1, -np.inf, _mild(rng, shape))


def _huge(rng, shape):
  return np.where(rng.random(shape) < 0.1, -1000, -1e-4 * rng.random(shape))


def _repeated_keys(rng, call):
  B, T, G, K = call.k.shape
  few = unit(rng.normal(size=(B, 3, G, K)))
  k = np.take_along_axis(few, rng.integers(0, 3, (B, T, G, 1)), axis=1)
  return call.replace(k=k, beta=np.ones_like(call.beta), log_decay=np.zeros_like(call.beta))


def _one_key(rng, call):
  k = np.broadcast_to(call.k[:, :1], call.k.shape)
  return call.replace(k=k, beta=np.ones_like(call.beta), log_decay=None)


def _correlated_keys(rng, call):
  return call.replace(k=unit(rng.random(call.k.shape)), beta=np.ones_like(call.beta))


def _near_identical_keys(rng, call):
  k = unit(call.k[:, :1] + 1e-2 * rng.normal(size=call.k.shape))
  return call.replace(k=k, beta=np.full_like(call.beta, 1.9), gamma=np.full_like(call.beta, 1.9))


def _gates_zero(rng, call):
  beta, gamma = (np.where(rng.random(g.shape) < 0.5, 0, g) for g in (call.beta, call.gamma))
  return call.replace(beta=beta, gamma=gamma)


def _negative_eigenvalues(rng, call):
  beta, gamma = rng.uniform(0, 2, (2, *call.beta.shape))
  return call.replace(beta=beta, gamma=gamma)


def _segments(rng, call):
  """Documents that start in a chunk, at its edge, one after another; and one that fills a row."""
  B, T = call.v.shape[:2]
  ids = np.full((B, T), 5, np.int32)
  for start in (1, 2, 15, 64, T - 1):
    ids[0, start:] += 1
  return call.replace(segment_ids=ids)


def _states_absent(rng, call):
  return call.replace(base=None, residual=None)


def _base_model(rng, call):
  return call.replace(gamma=None, residual=None)


def _gates_of(value):
  return lambda rng, call: call.replace(
    beta=np.full_like(call.beta, value), gamma=np.full_like(call.gamma, value)
  )


CASES = [
  Case('typical'),
  Case('one_token', {'T': 1}),
  Case('length_63', {'T': 63}),
  Case('length_64', {'T': 64}),
  Case('length_500', {'T': 500, 'B': 1}),
  Case('length_1000', {'T': 1000, 'B': 1}),
  Case('odd_sizes', {'B': 1, 'T': 37, 'G': 2, 'H': 6, 'K': 5, 'V': 7}),
  Case('wide_keys', {'B': 1, 'T': 70, 'G': 1, 'H': 2, 'K': 16, 'V': 4}),
  Case('strong_decay', {}, _log_decay(_strong)),
  Case('decay_e-5', {}, _log_decay(lambda rng, shape: np.full(shape, -5.0))),
  Case('few_tokens_strong_decay', {'T': 10}, _log_decay(_strong)),
  Case('zero_log_decay', {}, _log_decay(lambda rng, shape: np.zeros(shape))),
  Case('resets', {}, _log_decay(_resets)),
  Case('reset_every_token', {}, _log_decay(lambda rng, shape: np.full(shape, -np.inf))),
  Case('huge_and_tiny_decay', {}, _log_decay(_huge)),
  Case('repeated_keys', {}, _repeated_keys),
  Case('one_key', {}, _one_key),
  Case('correlated_keys', {}, _correlated_keys),
  Case('near_identical_keys', {}, _near_identical_keys),
  Case('clip_active', {}, _options(clip=0.3)),
  Case('clip_off', {}, _options(clip=None)),
  Case('gates_sometimes_zero', {}, _gates_zero),
  Case('gates_zero', {}, _gates_of(0.0)),
  Case('gates_saturated', {}, _gates_of(1.0)),
  Case('negative_eigenvalues', {}, _negative_eigenvalues),
  Case('grouped_heads', {'B': 1, 'G': 2, 'H': 4}),
  Case('segments', {}, _segments),
  Case('segments_and_resets', {}, _chain(_segments, _log_decay(_resets))),
  Case('read_out_sum', {}, _options(readout='sum')),
  Case('all_defaults', {}, _options(log_decay=None, beta=None, base=None, residual=None)),
  Case('channel_decay', {}, _channel(_mild)),
  Case('channel_strong_decay', {}, _channel(_strong)),
  Case('channel_resets', {}, _channel(_resets)),
  Case('channel_huge_and_tiny', {}, _channel(_huge)),
  Case(
    'channel_grouped_segments_sum', {'B': 1, 'G': 1},
    _chain(_channel(_mild), _segments, _options(readout='sum')),
  ),
  Case('base_model', {}, _base_model),
  Case('base_model_segments', {}, _chain(_base_model, _segments)),
  Case('base_model_channel', {}, _chain(_base_model, _channel(_strong))),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
# Compiled for themselves, and each near to a case or a test that always runs.
SLOW = {
  'length_64', 'length_500', 'wide_keys', 'few_tokens_strong_decay', 'clip_off', 'grouped_heads',
  'all_defaults', 'base_model_segments',
}  # fmt: skip
LOW_PRECISION = [
  BY_NAME[name]
  for name in (
    'typical', 'strong_decay', 'resets', 'correlated_keys', 'repeated_keys', 'segments',
    'channel_decay', 'base_model',
  )
]  # fmt: skip
SLOW_LOW_PRECISION = {'segments', 'base_model'}
