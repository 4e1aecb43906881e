"""The residual recurrence and its gradient in float64 numpy, one token at a time.

Written from the equations, without JAX and without the operators' code, so that it can judge them.
`recurrence` is the definition; `gradients` walks it backwards, token by token, applying the chain
rule to each of its lines. Decays are always handled a channel; a decay a head is summed at the end.
"""

import dataclasses

import numpy as np

GRADIENTS = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma', 'base', 'residual')
OUTPUTS = ('o', 'base', 'residual')


@dataclasses.dataclass(frozen=True)
class Call:
  """Arguments of an operator as numpy arrays; None where the caller passes none.

  Attributes:
    q: [B, T, G, K], as k. v is [B, T, H, V] and value head h reads head h // (H // G) of q and k.
    log_decay: natural log of the decay, [B, T, H] or [B, T, H, K]; -inf forgets everything.
    beta: [B, T, H], as gamma. Without gamma there is no residual state.
    base: state before the first token [B, H, K, V], as residual.
    segment_ids: [B, T]; where the id changes both states are zero before that token.
    update: 'additive' or 'delta'.
    clip: bound of the residual, None for no bound.
    readout: 'gated' or 'sum'.
  """

  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  log_decay: np.ndarray | None = None
  beta: np.ndarray | None = None
  gamma: np.ndarray | None = None
  base: np.ndarray | None = None
  residual: np.ndarray | None = None
  segment_ids: np.ndarray | None = None
  update: str = 'delta'
  clip: float | None = 1.0
  readout: str = 'gated'

  def replace(self, **changes) -> 'Call':
    """The same call with some arguments changed."""
    return dataclasses.replace(self, **changes)

  def arrays(self) -> dict[str, np.ndarray]:
    """The differentiable arguments that are given."""
    return {name: x for name in GRADIENTS if (x := getattr(self, name)) is not None}


def recurrence(call: Call) -> dict[str, np.ndarray]:
  """Runs a call: {'o': [B, T, H, V], 'base': [B, H, K, V], 'residual': the same}.

  'innovation' [B, T, H, V] comes along where there is a residual: v_t - S_{t-1}^T k_t, unclipped.
  Complex arguments are taken, for derivatives by complex steps.
  """
  x = _Full(call)
  length = x.v.shape[1]
  out = {'o': np.zeros_like(x.v), 'innovation': np.zeros_like(x.v)}
  S, R = x.base, x.residual
  for t in range(length):
    S, R = x.reset(t, S), x.reset(t, R)
    S_old, S, R = S, x.a[:, t] * S, x.a[:, t] * R
    d = x.v[:, t] - _read(S_old, x.k[:, t])
    r = _clip(d, call.clip)
    base_read = _read(S, x.q[:, t]) if call.readout == 'gated' else _read(S_old, x.q[:, t])
    S = x.write(t, S, x.b, x.v[:, t])
    R = x.write(t, R, x.g, r)
    if call.gamma is None:
      out['o'][:, t] = _read(S, x.q[:, t])
    else:
      out['innovation'][:, t] = d
      weight = x.g[:, t, :, None] if call.readout == 'gated' else 1
      out['o'][:, t] = base_read + weight * _read(R, x.q[:, t])
  out['base'] = S
  if call.gamma is None:
    del out['innovation']
  else:
    out['residual'] = R
  return out


def gradients(
  call: Call, cotangents: dict[str, np.ndarray], mask: np.ndarray | None = None
) -> dict[str, np.ndarray]:
  """Gradient of <cotangents, recurrence(call)> with respect to every array that the call gives.

  Args:
    call: the call.
    cotangents: of 'o', 'base' and 'residual'; one that is missing is zero.
    mask: bool [B, T, H, V], where the gradient passes the clip; None: where |innovation| < clip.
      Pinning it to that of another computation leaves rounding as the only difference.
  """
  x = _Full(call)
  length = x.v.shape[1]
  states = _states_before(x, call)
  do = cotangents.get('o', np.zeros_like(x.v)).astype(np.float64)
  dS = cotangents.get('base', np.zeros_like(x.base)).astype(np.float64)
  dR = cotangents.get('residual', np.zeros_like(x.base)).astype(np.float64)
  d = {name: np.zeros_like(getattr(x, name)) for name in ('q', 'k', 'v', 'a', 'b', 'g')}
  for t in reversed(range(length)):
    q, k, v, a, b, g = (getattr(x, n)[:, t] for n in ('q', 'k', 'v', 'a', 'b', 'g'))
    S_old, R_old = states[t]
    S_mid, R_mid = a * S_old, a * R_old
    innovation = v - _read(S_old, k)
    r = _clip(innovation, call.clip)
    dS_old = np.zeros_like(dS)
    if call.gamma is None:
      S_new = x.write(t, S_mid, x.b, v)
      d['q'][:, t] += _along(S_new, do[:, t])
      dS = dS + _outer(q, do[:, t])
    else:
      R_new = x.write(t, R_mid, x.g, r)
      if call.readout == 'gated':
        d['g'][:, t] += _dot(do[:, t], _read(R_new, q))
        d['q'][:, t] += _along(S_mid, do[:, t]) + g[..., None] * _along(R_new, do[:, t])
        dR = dR + _outer(q, g[..., None] * do[:, t])
      else:
        d['q'][:, t] += _along(S_old + R_new, do[:, t])
        dR = dR + _outer(q, do[:, t])
        dS_old += _outer(q, do[:, t])

    dR, dr, dk, d_g = _write_backward(call.update, R_mid, k, g, r, dR)
    d['g'][:, t] += d_g
    d['k'][:, t] += dk
    passes = _passes(innovation, call.clip) if mask is None else mask[:, t]
    dd = np.where(passes, dr, 0)
    d['v'][:, t] += dd
    d['k'][:, t] -= _along(S_old, dd)
    dS_old -= _outer(k, dd)

    dS, dv, dk, d_b = _write_backward(call.update, S_mid, k, b, v, dS)
    d['b'][:, t] += d_b
    d['k'][:, t] += dk
    d['v'][:, t] += dv
    if call.gamma is not None and call.readout == 'gated':
      dS = dS + _outer(q, do[:, t])

    d['a'][:, t] = (dS * S_old + dR * R_old).sum(-1, keepdims=True)
    dS, dR = x.reset(t, a * dS + dS_old), x.reset(t, a * dR)
  return x.collect(d | {'base': dS, 'residual': dR})


class _Full:
  """A call with every argument present, one q and k head a value head, decays a channel."""

  def __init__(self, call: Call):
    B, T, H, V = call.v.shape
    K = call.k.shape[-1]
    self.call, self.group = call, H // call.k.shape[2]
    kind = np.result_type(np.float64, *call.arrays().values())

    def full(array, shape, value):
      return np.full(shape, value, kind) if array is None else np.asarray(array, kind)

    self.q = np.repeat(full(call.q, None, None), self.group, axis=2)
    self.k = np.repeat(full(call.k, None, None), self.group, axis=2)
    self.v = full(call.v, None, None)
    a = np.exp(full(call.log_decay, (B, T, H), 0))
    self.a = (a if a.ndim == 4 else np.repeat(a[..., None], K, axis=-1))[..., None]
    self.b = full(call.beta, (B, T, H), 1)
    self.g = full(call.gamma, (B, T, H), 0)
    self.base = full(call.base, (B, H, K, V), 0)
    self.residual = full(call.residual, (B, H, K, V), 0)

  def reset(self, t: int, state: np.ndarray) -> np.ndarray:
    """A state, or the gradient of one, with nothing carried into a document that starts at t."""
    ids = self.call.segment_ids
    if t == 0 or ids is None:
      return state
    return np.where((ids[:, t] != ids[:, t - 1])[:, None, None, None], 0, state)

  def write(self, t, state, strength, value):
    """Equations 3 and 4 for a state that has already decayed."""
    if self.call.update == 'delta':
      value = value - _read(state, self.k[:, t])
    return state + strength[:, t, :, None, None] * _outer(self.k[:, t], value)

  def collect(self, d: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients of what the caller gave, in the caller's shapes."""
    B, T, H, K = d['k'].shape
    log_decay = (d['a'] * self.a)[..., 0]
    if self.call.log_decay is not None and self.call.log_decay.ndim == 3:
      log_decay = log_decay.sum(-1)
    found = {
      'q': d['q'].reshape(B, T, H // self.group, self.group, K).sum(3),
      'k': d['k'].reshape(B, T, H // self.group, self.group, K).sum(3),
      'v': d['v'],
      'log_decay': log_decay,
      'beta': d['b'],
      'gamma': d['g'],
      'base': d['base'],
      'residual': d['residual'],
    }
    return {name: found[name] for name in self.call.arrays()}


def _states_before(x: _Full, call: Call) -> list[tuple[np.ndarray, np.ndarray]]:
  S, R, states = x.base, x.residual, []
  for t in range(x.v.shape[1]):
    S, R = x.reset(t, S), x.reset(t, R)
    states.append((S, R))
    r = _clip(x.v[:, t] - _read(S, x.k[:, t]), call.clip)
    S = x.write(t, x.a[:, t] * S, x.b, x.v[:, t])
    R = x.write(t, x.a[:, t] * R, x.g, r)
  return states


def _write_backward(update, state, k, strength, value, d_new):
  """Chain rule of `_Full.write`: gradients of the state, the value, the key and the strength."""
  error = value - _read(state, k) if update == 'delta' else value
  d_write = strength[..., None, None] * d_new
  d_error = _read(d_write, k)
  d_k = _along(d_write, error)
  d_strength = _dot(_read(d_new, k), error)
  d_state = d_new
  if update == 'delta':
    d_state = d_new - _outer(k, d_error)
    d_k = d_k - _along(state, d_error)
  return d_state, d_error, d_k, d_strength


def _clip(d, clip):
  if clip is None:
    return d
  # Not np.clip: a complex step must pass through.
  return np.where(d.real > clip, clip, np.where(d.real < -clip, -clip, d))


def _passes(d, clip):
  return np.ones(d.shape, bool) if clip is None else np.abs(d) < clip


def _read(state, key):
  """S^T k: [..., K, V], [..., K] -> [..., V]."""
  return np.einsum('...kv,...k->...v', state, key)


def _along(state, value):
  """S u: [..., K, V], [..., V] -> [..., K]."""
  return np.einsum('...kv,...v->...k', state, value)


def _outer(key, value):
  return key[..., :, None] * value[..., None, :]


def _dot(x, y):
  return (x * y).sum(-1)
