"""Random calls and what they should give, in float64 on the host: for the kernels' self-tests."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

INPUTS = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma', 'base', 'residual')
STATES = ('base', 'residual')
OUTPUTS = ('o', *STATES)
GATES = ('log_decay', 'beta', 'gamma')
# RMS(error) / RMS(reference): values, gradients of tensors, gradients of gates.
BARS = {'float32': (2e-5, 2e-5, 2e-5), 'bfloat16': (0.005, 0.008, 0.02)}
BARS['float16'] = BARS['bfloat16']


@dataclasses.dataclass(frozen=True)
class Call:
  """What is computed, and on which sizes: letters as in `rla_jax.shapes`.

  Attributes:
    update: 'additive' or 'delta'.
    residual: whether there is a second state.
    readout: 'gated' or 'sum'.
    clip: bound of the residual, or None.
    dtype: of q, k, v.
    segmented: three documents in a sequence, else one.
    B, T, G, H, K, V: sizes.
  """

  update: str = 'delta'
  residual: bool = True
  readout: str = 'gated'
  clip: float | None = 1.0
  dtype: str = 'float32'
  segmented: bool = True
  B: int = 1
  T: int = 1
  G: int = 1
  H: int = 2
  K: int = 128
  V: int = 128


def make_problem(call: Call, seed: int) -> tuple[dict, np.ndarray | None, dict]:
  """(inputs by name, segments [B, T] or None, cotangents by output's name), numpy.

  Keys are alike, which an inverse of low precision breaks on; decays include a full reset.
  """
  rng = np.random.default_rng(seed)
  normal = rng.standard_normal
  B, T, G, H, K, V = call.B, call.T, call.G, call.H, call.K, call.V
  q, k = normal((2, B, T, G, K))
  k += 0.5 * normal((B, 1, G, K))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  log_decay = -rng.exponential(0.05, (B, T, H))
  if T > 2:
    log_decay[:, T // 3] = -np.inf
  beta, gamma = rng.uniform(0, 1, (2, B, T, H))
  base, residual = normal((2, B, H, K, V)) / np.sqrt(K)
  drawn = (q, k, normal((B, T, H, V)), log_decay, beta, gamma, base, residual)
  segments = None
  if call.segmented:
    segments = np.broadcast_to(np.arange(T) * 3 // T, (B, T)).astype(np.int32)
  inputs, cotangents = prepared(call, drawn, segments, rng)
  return inputs, segments, cotangents


def prepared(call: Call, drawn, segments, rng: np.random.Generator) -> tuple[dict, dict]:
  """(inputs, cotangents) by name: arrays drawn for INPUTS, in the types that kernels take.

  No v - S^T k lies near the clip's bound, where rounding would decide about its gradient.
  """
  inputs = dict(zip(INPUTS, drawn, strict=True))
  outputs = {'o': inputs['v'].shape, **dict.fromkeys(STATES, inputs['base'].shape)}
  if not call.residual:
    del inputs['gamma'], inputs['residual'], outputs['residual']
  dtype = jnp.dtype(call.dtype)
  inputs = {n: x.astype(dtype if n in 'qkv' else np.float32) for n, x in inputs.items()}
  if call.residual and call.clip is not None:
    with _float64():
      inputs['v'] = np.asarray(_clear_of_bound(call, _wide(inputs), segments)).astype(dtype)
  cotangents = {
    n: rng.standard_normal(shape).astype(dtype if n == 'o' else np.float32)
    for n, shape in outputs.items()
  }
  return inputs, cotangents


def reference(call: Call, inputs: dict, segments, cotangents: dict) -> tuple[dict, dict]:
  """(outputs, gradients) by name, token by token in float64 on the host's processor."""
  with _float64():
    call = dataclasses.replace(call, dtype='float64')  # one program for all types of inputs
    return jax.tree.map(np.asarray, _reference(call, _wide(inputs), segments, _wide(cotangents)))


def error(x, wanted) -> float:
  """RMS(x - wanted) / RMS(wanted); infinite where x is not finite."""
  x, wanted = _wide((x, wanted))
  rms = np.sqrt(np.mean((x - wanted) ** 2) / max(np.mean(wanted**2), 1e-60))
  return float(rms) if np.isfinite(rms) else float('inf')


def shares(dtype: str, values: tuple[dict, dict], wanted: tuple[dict, dict]) -> dict[str, float]:
  """Errors of outputs and gradients as shares of their bars: over 1 is wrong."""
  of_value, of_tensor, of_gate = BARS[dtype]
  found = {n: error(values[0][n], x) / of_value for n, x in wanted[0].items()}
  for n, x in wanted[1].items():
    found[f'd{n}'] = error(values[1][n], x) / (of_gate if n in GATES else of_tensor)
  return found


def check_step(call: Call, step: Callable, inputs: dict, cotangents: dict) -> dict[str, float]:
  """The same for the outputs of a decode step on the first token of every sequence.

  Its states are float32 whatever the values are.
  """
  step = functools.partial(step, update=call.update, clip=call.clip, readout=call.readout)
  token = {n: x if n in STATES else x[:, 0] for n, x in inputs.items()}
  out = jax.jit(step)(*(token.get(name) for name in INPUTS))
  wanted, _ = reference(call, inputs, None, cotangents)
  wanted['o'] = wanted['o'][:, 0]
  bars = dict.fromkeys(STATES, BARS['float32'][0]) | {'o': BARS[call.dtype][0]}
  return {n: error(y, wanted[n]) / bars[n] for n, y in zip(OUTPUTS, out) if y is not None}


def report(name: str, shares: dict[str, float]) -> bool:
  """Prints a line; returns whether all is well."""
  worst = max(shares, key=shares.get)
  is_right = shares[worst] <= 1
  detail = ' '.join(f'{n} {s:.2f}' for n, s in shares.items() if not s <= 1)
  verdict = 'ok   ' if is_right else 'WRONG'
  print(f'{verdict} {name}: worst {worst} at {shares[worst]:.2f} of its bar {detail}', flush=True)
  return is_right


@contextlib.contextmanager
def _float64():
  with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
    yield


def _wide(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@functools.partial(jax.jit, static_argnums=0)
def _reference(call, inputs, segments, cotangents):
  values, transpose = jax.vjp(lambda x: _recurrence(call, x, segments)[0], inputs)
  return values, transpose(cotangents)[0]


@functools.partial(jax.jit, static_argnums=0)
def _clear_of_bound(call, inputs, segments):
  """Values moved away from where the clip's gradient jumps."""
  return _recurrence(call, inputs, segments, margin=0.06)[1]


def _recurrence(call, x, segments, margin=0.0):
  """Outputs by name (equations 1 to 5), and v with its innovations `margin` clear of the clip."""
  repeats = call.H // call.G
  delta, zero = call.update == 'delta', jnp.zeros_like(x['base'])
  starts = jnp.zeros((call.B, call.T), bool)
  if segments is not None:
    starts = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0

  def write(state, k, strength, value, decay):
    state = decay * state
    if delta:
      value = value - jnp.einsum('bhkv,bhk->bhv', state, k)
    return state + jnp.einsum('bhk,bhv->bhkv', k, strength[..., None] * value)

  def token(states, t):
    S, R = (jnp.where(t['start'][:, None, None, None], 0, s) for s in states)
    q, k = (jnp.repeat(t[n], repeats, axis=1) for n in ('q', 'k'))
    decay = jnp.exp(t['log_decay'])[..., None, None]
    v, prediction = t['v'], jnp.einsum('bhkv,bhk->bhv', S, k)
    if margin:
      is_near = jnp.abs(jnp.abs(v - prediction) - call.clip) < margin
      inside = prediction + jnp.sign(v - prediction) * (call.clip - 2 * margin)
      v = jnp.where(is_near, inside, v)

    def read(state):
      return jnp.einsum('bhkv,bhk->bhv', state, q)

    S_new = write(S, k, t['beta'], v, decay)
    if not call.residual:
      return (S_new, R), (read(S_new), v)
    r = v - prediction
    if call.clip is not None:
      r = jnp.clip(r, -call.clip, call.clip)
    R_new = write(R, k, t['gamma'], r, decay)
    if call.readout == 'gated':
      o = read(decay * S) + t['gamma'][..., None] * read(R_new)
    else:
      o = read(S) + read(R_new)
    return (S_new, R_new), (o, v)

  tokens = {n: jnp.moveaxis(y, 1, 0) for n, y in x.items() if n not in STATES}
  tokens['start'] = starts.T
  states, (o, v) = jax.lax.scan(token, (x['base'], x.get('residual', zero)), tokens)
  outputs = dict(zip(OUTPUTS, (jnp.moveaxis(o, 0, 1), *states)))
  if not call.residual:
    del outputs['residual']
  return outputs, jnp.moveaxis(v, 0, 1)
