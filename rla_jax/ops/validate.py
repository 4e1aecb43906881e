"""Checks the arguments of an operator and fills in their defaults."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from rla_jax.ops.inputs import Inputs, Options, accumulator_dtype, vary_alike
from rla_jax.ops.segments import count_segments
from rla_jax.ops.state import ResidualState


def canonicalise(
  update, q, k, v, log_decay, beta, gamma, *, clip, initial_state, segment_ids, readout, chunk_size,
  finite=False,
) -> tuple[Inputs, Options]:
  """Canonical form of a call with a time axis. Raises ValueError, naming the argument."""
  options = _options(update, clip, readout, chunk_size, finite)
  B, T, H = _heads_of(q, k, v, ('B', 'T'))
  K, V = k.shape[-1], v.shape[-1]
  gate = (B, T, H)
  log_decay, beta, gamma = _gates(v, log_decay, beta, gamma, gate, K)
  state = _state(initial_state, (B, H, K, V), gamma, v)
  if segment_ids is not None:
    check_segment_ids(segment_ids, (B, T))
    segment_ids = count_segments(jnp.asarray(segment_ids))
  q, k, v = _promote(q, k, v)
  return vary_alike(Inputs(q, k, v, log_decay, beta, gamma, state, segment_ids)), options


def canonicalise_step(
  update, q, k, v, log_decay, beta, gamma, state, *, clip, readout
) -> tuple[Inputs, Options]:
  """Canonical form of a call for one token: arrays without the time axis."""
  options = _options(update, clip, readout, None)
  B, H = _heads_of(q, k, v, ('B',))
  K, V = k.shape[-1], v.shape[-1]
  log_decay, beta, gamma = _gates(v, log_decay, beta, gamma, (B, H), K)
  state = _state(state, (B, H, K, V), gamma, v, name='state')
  q, k, v = _promote(q, k, v)
  return vary_alike(Inputs(q, k, v, log_decay, beta, gamma, state, None)), options


def check_array(name: str, x, axes: str) -> None:
  """Raises ValueError unless x is a floating array with as many axes as are named: 'B, T, D'."""
  if not hasattr(x, 'shape') or not hasattr(x, 'dtype'):
    raise ValueError(f'{name} is a {type(x).__name__}; expected an array [{axes}]')
  rank = axes.count(',') + 1
  if len(x.shape) != rank:
    raise ValueError(f'{name} has shape {x.shape}; expected {rank} dimensions [{axes}]')
  _check_floating(name, x)


def check_segment_ids(segment_ids, shape: tuple[int, int]) -> None:
  """Raises ValueError unless the ids are integers of this shape (B, T)."""
  _check_shape('segment_ids', segment_ids, shape, '[B, T]')
  if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(f'segment_ids has dtype {segment_ids.dtype}; expected an integer dtype')


def _options(update, clip, readout, chunk_size, finite=False):
  if clip is not None:
    if isinstance(clip, jax.core.Tracer):
      raise ValueError('clip is traced; expected a Python number > 0, or None for no clipping')
    try:
      bound = float(clip)
    except (TypeError, ValueError):
      bound = math.nan
    if not bound > 0:
      raise ValueError(f'clip is {clip!r}; expected a number > 0, or None for no clipping')
    clip = None if math.isinf(bound) else bound
  if readout not in ('gated', 'sum'):
    raise ValueError(f"readout is {readout!r}; expected 'gated' or 'sum'")
  if chunk_size is not None and (
    isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1
  ):
    raise ValueError(f'chunk_size is {chunk_size!r}; expected a positive int, or None')
  return Options(update, clip, readout, chunk_size, bool(finite))


def _heads_of(q, k, v, lead):
  """Checks q, k and v against each other; returns their leading sizes and the value heads."""
  lead_text = ', '.join(lead)
  for name, x, tail in (('q', q, 'G, K'), ('k', k, 'G, K'), ('v', v, 'H, V')):
    check_array(name, x, f'{lead_text}, {tail}')
  if q.shape != k.shape:
    raise ValueError(f'q has shape {q.shape} and k has shape {k.shape}; expected equal shapes')
  if v.shape[:-2] != k.shape[:-2]:
    raise ValueError(
      f'v has shape {v.shape} and k has shape {k.shape}; expected equal [{lead_text}]'
    )
  heads, groups = v.shape[-2], k.shape[-2]
  if groups == 0 or heads % groups:
    raise ValueError(
      f'v has {heads} heads (shape {v.shape}) and k has {groups} (shape {k.shape}); '
      'expected the heads of k to divide those of v'
    )
  return (*v.shape[:-2], heads)


def _gates(v, log_decay, beta, gamma, shape, key_dim):
  """Gates in the accumulator's dtype: no decay and beta = 1 by default."""
  axes = '[B, T, H]' if len(shape) == 3 else '[B, H]'
  dtype = accumulator_dtype(v.dtype)
  for name, gate in (('beta', beta), ('gamma', gamma)):
    if gate is not None:
      _check_shape(name, gate, shape, axes)
      _check_floating(name, gate)
  if log_decay is None:
    log_decay = jnp.zeros(shape, dtype)
  else:
    channel = (*shape, key_dim)
    if getattr(log_decay, 'shape', None) not in (shape, channel):
      got = getattr(log_decay, 'shape', type(log_decay).__name__)
      raise ValueError(
        f'log_decay has shape {got}; expected {axes} = {shape}, or one decay a channel = {channel}'
      )
    _check_floating('log_decay', log_decay)
    _check_not_positive(log_decay)
  beta = jnp.ones(shape, dtype) if beta is None else beta.astype(dtype)
  gamma = None if gamma is None else gamma.astype(dtype)
  return log_decay.astype(dtype), beta, gamma


def _state(state, shape, gamma, v, name='initial_state'):
  dtype = accumulator_dtype(v.dtype)
  if state is None:
    zeros = jnp.zeros(shape, dtype)
    return ResidualState(zeros, None if gamma is None else zeros)
  if not isinstance(state, tuple) or len(state) != 2:
    raise ValueError(f'{name} is a {type(state).__name__}; expected a ResidualState')
  base, residual = state
  if (residual is None) != (gamma is None):
    given, wanted = ('None', 'an array') if residual is None else ('an array', 'None')
    raise ValueError(
      f'{name}.residual is {given} while gamma is {"None" if gamma is None else "given"}; '
      f'expected {wanted}: a residual state goes with gamma'
    )
  for part, x in (('base', base), ('residual', residual)):
    if x is not None:
      _check_shape(f'{name}.{part}', x, shape, '[B, H, K, V]')
      _check_floating(f'{name}.{part}', x)
  return ResidualState(*(None if x is None else x.astype(dtype) for x in (base, residual)))


def _promote(q, k, v):
  dtype = jnp.result_type(q, k, v)
  return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def _check_shape(name, x, shape, axes):
  got = getattr(x, 'shape', None)
  if got != shape:
    shown = f'is a {type(x).__name__}' if got is None else f'has shape {got}'
    raise ValueError(f'{name} {shown}; expected {axes} = {shape}')


def _check_floating(name, x):
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'{name} has dtype {x.dtype}; expected a floating dtype')


def _check_not_positive(log_decay):
  """A positive log decay grows the state without bound; seen only where values are at hand."""
  if isinstance(log_decay, jax.core.Tracer) or not isinstance(log_decay, (np.ndarray, jax.Array)):
    return
  if not log_decay.size:
    return
  # An array that a traced function closes over is at hand too.
  with jax.ensure_compile_time_eval():
    largest = float(jnp.max(log_decay))
  if largest > 0:
    raise ValueError(
      f'log_decay holds {largest:.6g}; expected natural logs of a decay in [0, 1], so values <= 0'
    )
