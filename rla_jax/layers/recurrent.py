"""The mathematics of every recurrent layer, as pure functions of parameters and inputs.

    q, k, v = silu(conv(x W)), q and k with unit L2 norm          log alpha, beta, gamma = gates(x)
    o, S, R = operator(q / sqrt(K), k, v, log alpha, beta, gamma)
    y = (rms_norm(o) * silu(x W)) W

The Linen and the NNX layers only hold the parameters, so equal weights give equal bits.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rla_jax import ops
from rla_jax.layers.cache import RecurrentCache, last_segment
from rla_jax.layers.conv import init_taps, next_tail
from rla_jax.layers.gates import compute_gates, gate_parameters
from rla_jax.layers.head_inputs import ACTIVATIONS, head_inputs
from rla_jax.layers.norms import at_least_float32, rms_norm
from rla_jax.layers.settings import Settings
from rla_jax.layers.split import divide
from rla_jax.layers.statistics import recurrence_statistics
from rla_jax.ops.segments import count_segments
from rla_jax.shapes import Array, Float, Segments


def parameters(s: Settings, model_dim: int) -> dict:
  """Every parameter of a layer by name: its shape and its initializer (key, shape, dtype) -> array.

  Projections are [inputs, outputs], convolutions [W, channels]; heads are the slower index.
  """
  key_size, value_size = s.key_heads * s.head_dim, s.num_heads * s.value_dim
  sizes = {'q': key_size, 'k': key_size, 'v': value_size}
  found = {f'{name}_proj': ((model_dim, size), s.kernel_init) for name, size in sizes.items()}
  if s.conv_width is not None:
    found |= {f'{name}_conv': ((s.conv_width, size), init_taps) for name, size in sizes.items()}
  found |= gate_parameters(s, model_dim)
  if s.skip:
    found['skip_scale'] = (s.num_heads,), jax.nn.initializers.ones
  if s.output_gate != 'none' and s.low_rank_gate:
    found['output_gate_down_proj'] = (model_dim, s.value_dim), s.kernel_init
    found['output_gate_up_proj'] = (s.value_dim, value_size), s.kernel_init
  elif s.output_gate != 'none':
    found['output_gate_proj'] = (model_dim, value_size), s.kernel_init
  if s.output_norm != 'none':
    size = s.value_dim if s.output_norm == 'head' else value_size
    found['norm_scale'] = (size,), jax.nn.initializers.ones
  found['o_proj'] = (value_size, model_dim), s.kernel_init
  return found


def init_cache(s: Settings, batch_size: int, dtype=jnp.float32) -> RecurrentCache:
  """The cache before the first token; `dtype` is that of the layer's products."""
  state_heads = 2 * s.num_heads if s.two_states else s.num_heads
  shape = batch_size, state_heads, s.head_dim, s.value_dim
  state_dtype = at_least_float32(dtype)
  base = jnp.zeros(shape, state_dtype)
  residual = jnp.zeros(shape, state_dtype) if s.residual else None
  tails = {}
  if s.conv_width is not None:
    key_size, value_size = s.key_heads * s.head_dim, s.num_heads * s.value_dim
    sizes = {'q': key_size, 'k': key_size, 'v': value_size}
    tails = {n: jnp.zeros((batch_size, s.conv_width - 1, c), dtype) for n, c in sizes.items()}
  segment = jnp.zeros(batch_size, jnp.int32)
  return RecurrentCache(tails, ops.ResidualState(base, residual), segment, jnp.int32(0))


def mix(
  s: Settings,
  params: dict,
  x: Float[Array, 'B T D'],
  segment_ids: Segments | None = None,
  cache: RecurrentCache | None = None,
  observe: Callable[[dict], None] | None = None,
) -> tuple[Float[Array, 'B T D'], RecurrentCache | None]:
  """The layer: y [B, T, D] and the cache after the last token (None without one).

  Args:
    s: what to compute.
    params: as `parameters` names them.
    x: inputs.
    segment_ids: documents of a packed sequence; see `cache.py` for both.
    cache: from `init_cache`, or from the call before.
    observe: takes what `statistics.py` says of the recurrence, at the price of running it again.
  """
  dtype = jnp.dtype(s.dtype or x.dtype)
  x_BTD = x.astype(dtype)
  if x.shape[1] == 0:
    return x_BTD, cache
  division = divide(*x.shape[:2], cached=cache is not None)
  resumed = None if cache is None else cache.resume(segment_ids)
  documents_BT = None if segment_ids is None else count_segments(segment_ids)
  positions_T = jnp.arange(x.shape[1]) + (0 if cache is None else cache.length)

  heads, faults, tails = {}, {}, {}
  for name in ('q', 'k', 'v'):
    h_BTX = jnp.dot(x_BTD, params[f'{name}_proj'].astype(dtype))
    tail = None
    if s.conv_width is not None and cache is not None:
      tail = resumed.tails[name]
      last_BTX = next_tail(h_BTX, s.conv_width, documents_BT, tail)
      tails[name] = last_BTX.astype(tail.dtype)
    taps_WX = params.get(f'{name}_conv')
    if division is None:
      heads[name], faults[name] = head_inputs(
        s, name, h_BTX, taps_WX, documents_BT, tail, positions_T
      )
    else:
      heads[name], faults[name] = division.head_inputs(
        functools.partial(head_inputs, s, name), s.num_heads if name == 'v' else s.key_heads,
        h_BTX, taps_WX, segment_ids, tail, positions_T,
      )  # fmt: skip
  gates = compute_gates(s, params, x_BTD)
  finite = all(x is not None for x in faults.values())
  if finite:
    gates = _marked(gates, faults, heads['v'])
  state = None if cache is None else resumed.state

  def recur(s, heads, gates, keep_state=True):
    function = functools.partial(_recur, s, finite)
    if division is None:
      return function(heads, gates, segment_ids, state)
    return division.recur(function, heads, gates, segment_ids, state, keep_state)

  if observe is not None:
    observe(recurrence_statistics(s, recur, heads, gates))
  o_BTHV, state = recur(s, heads, gates, keep_state=False)
  o_BTHV = checkpoint_name(o_BTHV, 'mixer_output')

  gate_BTX = _output_gate(s, params, x_BTD)
  skip_H, scale = params.get('skip_scale'), params.get('norm_scale')
  o_BTX = _head_outputs(s, o_BTHV, heads['v'], skip_H, gate_BTX, scale)
  y_BTD = jnp.dot(o_BTX, params['o_proj'].astype(dtype))
  if cache is None:
    return y_BTD, None
  state = jax.tree.map(lambda new, old: new.astype(old.dtype), state, cache.state)
  length = cache.length + x.shape[1]
  return y_BTD, RecurrentCache(tails, state, last_segment(segment_ids, cache), length)


def _marked(gates, faults, v_BTHV):
  """The gates, the first of them NaN at tokens whose q, k or v was not finite and is zeros now.

  So the operator, which keeps what is not finite within its document, need not look through them.
  """
  log_decay, beta, gamma = gates
  bad_BT = functools.reduce(jnp.logical_or, (x.any(axis=2) for x in faults.values()))
  if log_decay is None:
    log_decay = jnp.zeros(v_BTHV.shape[:3], at_least_float32(v_BTHV.dtype))
  bad = jnp.expand_dims(bad_BT, range(2, log_decay.ndim))
  return jnp.where(bad, jnp.nan, log_decay), beta, gamma


def _recur(s, finite, heads, gates, segment_ids, state, axis_name=None):
  """Runs the operator, on a sequence split along `axis_name`, or its step for one cached token."""
  q, k, v = heads['q'], heads['k'], heads['v']
  log_decay, beta, gamma = gates
  shape = v.shape
  if s.two_states:
    v, log_decay, beta = _two_states(v, log_decay, beta, gamma)
    gamma = None
  arguments = q, k, v, log_decay, beta, gamma
  options = {'clip': s.clip, 'readout': s.readout}
  if state is not None and shape[1] == 1:
    step = ops.residual_delta_rule_step
    if s.update == 'additive':
      step = ops.residual_linear_attention_step
    token = [None if a is None else a[:, 0] for a in arguments]
    o_BHV, state = step(*token, state, **options)
    o_BTHV = o_BHV[:, None]
  else:
    operator = ops.residual_delta_rule
    if s.update == 'additive':
      operator = ops.residual_linear_attention
    if axis_name is not None:
      split = ops.split_over_heads if s.exchange_heads else ops.split_over_sequence
      operator = functools.partial(split, operator, axis_name=axis_name)
    o_BTHV, state = operator(
      *arguments, initial_state=state, segment_ids=segment_ids, chunk_size=s.chunk_size,
      implementation=s.implementation, finite=finite, **options,
    )  # fmt: skip
  if s.two_states:
    o_BTHV = o_BTHV.reshape(*shape[:3], 2, shape[3]).sum(axis=3)
  return o_BTHV, state


def _two_states(v_BTHV, log_decay, beta_BTH, gamma_BTH):
  """Neighbouring heads 2h and 2h + 1 write the same v at rates beta and gamma."""
  if beta_BTH is None:
    beta_BTH = jnp.ones_like(gamma_BTH)
  B, T, H = beta_BTH.shape
  rates_BTH = jnp.stack([beta_BTH, gamma_BTH], axis=3).reshape(B, T, 2 * H)
  if log_decay is not None:
    log_decay = jnp.repeat(log_decay, 2, axis=2)
  return jnp.repeat(v_BTHV, 2, axis=2), log_decay, rates_BTH


def _output_gate(s, params, x_BTD):
  if s.output_gate == 'none':
    return None
  names = ('output_gate_proj',)
  if s.low_rank_gate:
    names = ('output_gate_down_proj', 'output_gate_up_proj')
  for name in names:
    x_BTD = jnp.dot(x_BTD, params[name].astype(x_BTD.dtype))
  return x_BTD


# Elementwise work, so cheaper to repeat in the backward pass than to keep its float32 inside.
@functools.partial(jax.checkpoint, static_argnums=(0,))
def _head_outputs(s, o_BTHV, v_BTHV, skip_H, gate_BTX, scale):
  """Skip, norm and gate of the read-out, heads merged; rounded once, at the end."""
  B, T, H, V = o_BTHV.shape
  dtype = o_BTHV.dtype
  o_BTHV = o_BTHV.astype(at_least_float32(dtype))
  if skip_H is not None:
    o_BTHV += skip_H.astype(o_BTHV.dtype)[None, None, :, None] * v_BTHV.astype(o_BTHV.dtype)
  if s.output_norm == 'head':
    o_BTHV = rms_norm(o_BTHV, scale, s.norm_eps)
  o_BTX = o_BTHV.reshape(B, T, H * V)
  if gate_BTX is not None:
    o_BTX *= ACTIVATIONS[s.output_gate](gate_BTX.astype(o_BTX.dtype))
  if s.output_norm == 'gated':
    o_BTX = rms_norm(o_BTX, scale, s.norm_eps)
  return o_BTX.astype(dtype)
