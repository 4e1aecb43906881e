"""Errors of values and gradients against the recurrence in float64, token by token.

Where |v - S^T k| is within rounding of the bound, two right implementations may clip differently
and the gradient jumps. So gradients are compared with the clip mask pinned to the implementation's
own, which is read off its dv: near the bound, whichever of the two masks explains dv better. An
entry changes the gradients of others, so this is repeated until none changes. How many entries
differ from the oracle's mask is reported beside.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ops_benchmark.problem import Problem, make_inputs
from rla_jax import ops

CLIP = 1.0
BLOCK = 64
LONGEST = 4160  # a multiple of BLOCK
NEAR = 0.03  # entries this close to the bound may be clipped either way
ROUNDS = 16  # of reading the mask off dv; 3 to 5 settle 2048 tokens of keys that are alike
NAMES = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma', 'base', 'residual')
GATES = ('log_decay', 'beta', 'gamma')
# RMS(error) / RMS(reference); a gate's gradient also has a cosine of at least 0.999.
BARS = {
  'float32': {'values': 2e-5, 'gradients': 2e-5, 'gates': 2e-5},
  'bfloat16': {'values': 0.005, 'gradients': 0.008, 'gates': 0.02},
  'float16': {'values': 0.005, 'gradients': 0.008, 'gates': 0.02},
}
FLIPPED = {'float32': 1e-4, 'bfloat16': 0.005, 'float16': 0.005}  # share of the mask's entries


@dataclasses.dataclass(frozen=True)
class Report:
  """Errors by tensor name, cosines of the gates' gradients, the share of flipped mask entries.

  Unless a mask was found that explains dv (`settled`), the gradients' errors mean nothing.
  """

  errors: dict[str, float]
  cosines: dict[str, float]
  flipped: float
  settled: bool

  def failures(self, dtype: str) -> list[str]:
    """Every tensor over its bar, with the figure."""
    bars, found = BARS[dtype], []
    for name, error in self.errors.items():
      kind = 'values'
      if name.startswith('d'):
        kind = 'gates' if name[1:] in GATES else 'gradients'
      if not error <= bars[kind]:
        found.append(f'{name} {error:.2e} > {bars[kind]:g}')
    found += [f'cosine of {n} {c:.5f}' for n, c in self.cosines.items() if not c >= 0.999]
    if self.flipped > FLIPPED[dtype]:
      found.append(f'flipped_mask_entries {self.flipped:.2e} > {FLIPPED[dtype]:g}')
    return found if self.settled else [*found, f'mask not settled after {ROUNDS} rounds']


def check(problem: Problem, implementation: str, seed: int, *, packed=False, correlation=0.0):
  """Compares an implementation with the oracle on fresh inputs. Returns a Report."""
  arrays, segments, cotangents = _draw(problem, seed, packed, correlation)
  values, gradients = _candidate(problem, implementation, arrays, segments, cotangents)
  oracle = functools.partial(_oracle, problem, arrays, segments, cotangents)
  wanted, wanted_gradients, innovation, dr = oracle()
  flipped, settled = 0.0, True
  if problem.has_residual:
    mask = pinned = np.abs(innovation) < CLIP
    for _ in range(ROUNDS):
      before = pinned
      pinned = _read_off_mask(before, innovation, dr, gradients['v'], wanted_gradients['v'])
      settled = np.array_equal(pinned, before)
      if settled:
        break
      _, wanted_gradients, _, dr = oracle(pinned)
    flipped = float(np.mean(pinned != mask))
  errors = {n: _error(values[n], wanted[n]) for n in values}
  errors |= {f'd{n}': _error(gradients[n], wanted_gradients[n]) for n in gradients}
  cosines = {
    f'd{n}': _cosine(gradients[n], wanted_gradients[n]) for n in gradients if n in GATES
  }
  return Report(errors, cosines, flipped, settled)


def _draw(problem, seed, packed, correlation):
  arrays = make_inputs(problem, seed, correlation)
  rng = np.random.default_rng(seed + 1)
  state = (problem.batch, problem.heads, problem.size, problem.size)
  arrays['base'], arrays['residual'] = 0.1 * rng.standard_normal((2, *state), dtype=np.float32)
  if not problem.has_residual:
    del arrays['gamma'], arrays['residual']
  for name in 'qkv':
    arrays[name] = arrays[name].astype(jnp.dtype(problem.dtype))
  segments = None
  if packed:
    ends = rng.random((problem.batch, problem.length)) < 4 / problem.length
    segments = np.cumsum(ends, axis=1).astype(np.int32)
  shapes = {'o': arrays['v'].shape, 'base': state, 'residual': state}
  if not problem.has_residual:
    del shapes['residual']
  cotangents = {n: rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items()}
  cotangents['o'] = cotangents['o'].astype(jnp.dtype(problem.dtype))
  return arrays, segments, cotangents


def _candidate(problem, implementation, arrays, segments, cotangents):
  call = ops.residual_delta_rule if problem.is_delta else ops.residual_linear_attention

  def run(arrays):
    state = ops.ResidualState(arrays['base'], arrays.get('residual'))
    gates = [arrays.get(n) for n in GATES]
    o, state = call(
      arrays['q'], arrays['k'], arrays['v'], *gates, clip=CLIP, initial_state=state,
      segment_ids=segments, implementation=implementation,
    )  # fmt: skip
    outputs = {'o': o, 'base': state.base}
    return outputs | ({'residual': state.residual} if problem.has_residual else {})

  @jax.jit
  def both(arrays, cotangents):
    values, pullback = jax.vjp(run, arrays)
    return values, pullback(cotangents)[0]

  values, gradients = both(arrays, cotangents)
  return jax.tree.map(lambda x: np.asarray(x, np.float64), (values, gradients))


def _oracle(problem, arrays, segments, cotangents, mask=None):
  """Values, gradients, v - S^T k, and the gradient that reaches the clipped residual; float64."""
  T = problem.length
  unit = LONGEST if T > BLOCK else BLOCK  # so that two compilations serve every length
  padded = -(-T // unit) * unit
  starts = np.zeros((problem.batch, T), bool)
  if segments is not None:
    starts[:, 1:] = np.diff(segments, axis=1) != 0
  tokens = {n: x for n, x in arrays.items() if n not in ('base', 'residual')}
  tokens |= {'start': starts, 'live': np.ones_like(starts)}
  tokens['mask'] = np.zeros(arrays['v'].shape, bool) if mask is None else mask

  def lengthened(x):
    x = np.pad(x, [(0, 0), (0, padded - T)] + [(0, 0)] * (x.ndim - 2))
    return x if x.dtype == bool else x.astype(np.float64)

  tokens = {n: lengthened(x) for n, x in tokens.items()}
  do = lengthened(cotangents['o'])
  wide = {n: np.asarray(x, np.float64) for n, x in arrays.items() if n in ('base', 'residual')}
  dstates = {n: np.asarray(cotangents[n], np.float64) for n in wide}
  with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
    answer = _differentiate(tokens, wide, do, dstates, mask is not None, problem.is_delta)
    answer = jax.tree.map(np.asarray, answer)
  cut = [jax.tree.map(lambda x: x[:, :T], part) for part in answer[:4]]
  values, token_gradients, innovation, dr = cut
  return values | answer[4], token_gradients | answer[5], innovation, dr


@functools.partial(jax.jit, static_argnums=5)
def _differentiate(tokens, states, do, dstates, use_mask, is_delta):
  fixed = {n: x for n, x in tokens.items() if x.dtype == bool}
  free = {n: x for n, x in tokens.items() if x.dtype != bool}
  free['probe'] = jnp.zeros_like(tokens['v'])

  def run(free, states):
    return _recurrence(free | fixed, states, use_mask, is_delta)

  (o, innovation, final), pullback = jax.vjp(run, free, states)
  gradients, state_gradients = pullback((do, jnp.zeros_like(innovation), dstates))
  dr = gradients.pop('probe')
  return {'o': o}, gradients, innovation, dr, final, state_gradients


def _recurrence(tokens, states, use_mask, is_delta):
  """The definition, in the dtype of its arguments. A given mask decides the clip's gradient."""
  has_residual = 'residual' in states

  def read(M, x):
    return jnp.einsum('bhkv,bhk->bhv', M, x, precision='highest')

  def step(states, x):
    fresh, live = (x[n][:, None, None, None] for n in ('start', 'live'))
    states = {n: jnp.where(fresh, 0, M) for n, M in states.items()}
    a, S = jnp.exp(x['log_decay'])[..., None], states['base']

    def write(M, value, rate):
      value = value - a * read(M, x['k']) if is_delta else value
      new = a[..., None] * M + x['k'][..., None] * (rate[..., None] * value)[..., None, :]
      return jnp.where(live, new, M)

    innovation = x['v'] - read(S, x['k'])
    new = {'base': write(S, x['v'], x['beta'])}
    if not has_residual:
      return new, (read(new['base'], x['q']), innovation)
    passes = jnp.where(use_mask, x['mask'], jnp.abs(innovation) < CLIP)
    through = jnp.where(passes, innovation, 0)
    r = through + jax.lax.stop_gradient(jnp.clip(innovation, -CLIP, CLIP) - through) + x['probe']
    new['residual'] = write(states['residual'], r, x['gamma'])
    o = a * read(S, x['q']) + x['gamma'][..., None] * read(new['residual'], x['q'])
    return new, (o, innovation)

  def blocked(x):  # tokens of a block have their states recomputed together for the gradient
    return jnp.moveaxis(x, 1, 0).reshape(-1, BLOCK, *x.shape[:1], *x.shape[2:])

  outer = jax.checkpoint(lambda states, x: jax.lax.scan(step, states, x))
  states, outputs = jax.lax.scan(outer, states, jax.tree.map(blocked, tokens))
  o, innovation = (jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 0, 1) for x in outputs)
  return o, innovation, states


def _read_off_mask(mask, innovation, dr, dv, wanted_dv):
  """`mask` with the other side where that explains dv better; dr and wanted_dv are by `mask`."""
  other = wanted_dv + np.where(mask, -dr, dr)
  near = np.abs(np.abs(innovation) - CLIP) < NEAR
  flips = near & (np.abs(dv - other) < np.abs(dv - wanted_dv))
  return mask ^ flips


def _error(x, y) -> float:
  y = np.asarray(y, np.float64)
  difference, size = np.sqrt(np.mean((x - y) ** 2)), np.sqrt(np.mean(y**2))
  return float(difference / size) if size else float(difference)


def _cosine(x, y) -> float:
  y = np.asarray(y, np.float64)
  size = np.linalg.norm(x) * np.linalg.norm(y)
  return float(np.sum(x * y) / size) if size else 1.0
