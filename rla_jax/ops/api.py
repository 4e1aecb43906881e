"""The public operators: validate, canonicalise, choose an implementation, run it."""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from rla_jax.ops import dispatch, segments
from rla_jax.ops.inputs import Inputs, Options, Readout
from rla_jax.ops.state import ResidualState
from rla_jax.ops.validate import canonicalise, canonicalise_step
from rla_jax.shapes import Array, Float, Gate, LogDecay, Queries, Segments, Values

Implementation = str | Sequence[str] | None

_ARGUMENTS = """
  Args:
    q: queries [B, T, G, K], used as given: neither normalised nor scaled.
    k: keys [B, T, G, K]; the paper's are L2-normalised. Value head h reads query and key head
      h // (H // G).
    v: values [B, T, H, V]. Any floating dtype; products accumulate in float32 (float64 inputs:
      float64).
    log_decay: natural log of the decay alpha, <= 0, [B, T, H], or [B, T, H, K] for a decay a
      channel. -inf forgets everything. None: no decay.
    beta: write strength of the base state [B, T, H]; (0, 2) for negative eigenvalues. None: 1.
    gamma: write and read strength of the residual state [B, T, H]. None: the base model without a
      residual state, read out as o_t = S_t^T q_t.
    clip: bound of the residual, > 0. None: none. The gradient passes where |v - S^T k| < clip.
    initial_state: states before the first token, as returned by an earlier call. None: zeros.
    segment_ids: int [B, T]. Where the id changes both states are zero before that token; an initial
      state reaches the first segment only. What is not finite stays inside its segment.
    finite: q, k and v are known to hold neither NaN nor infinity, so that with segment_ids they are
      not searched. The gates and the state still may, but give NaN to gradients of their own only.
    readout: 'gated', or 'sum' for o_t = S_{t-1}^T q_t + R_t^T q_t (an ablation of the paper).
    chunk_size: tokens of a chunk; None: the implementation's choice.
    implementation: None picks the best for this platform; a name ('reference', 'associative',
      'chunked', 'triton', 'pallas') means exactly that one; a sequence is tried in order.

  Returns:
    o [B, T, H, V] in v's dtype, and the state after the last token, in float32.

  Raises:
    ValueError: a wrong rank, shape, dtype or value; the message names the argument.
    NotImplementedError: the implementation asked for cannot serve the call; it says why and which
      can.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from rla_jax import ops
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 10, 2, 8))
    >>> k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    >>> gate = jnp.full((1, 10, 2), 0.5)
    >>> o, state = ops.{name}(q, k, v, jnp.log(gate), gate, gate)
    >>> o.shape, state.base.shape, state.residual.shape
    ((1, 10, 2, 8), (1, 2, 8, 8), (1, 2, 8, 8))

  Reference:
    Lai, Kang, Lu, Lin, Zhao: Enhancing Linear Attention with Residual Learning, arXiv:2509.25223.
"""


def _documented(function: Callable) -> Callable:
  function.__doc__ += _ARGUMENTS.replace('{name}', function.__name__)
  return function


@_documented
def residual_linear_attention(
  q: Queries,
  k: Queries,
  v: Values,
  log_decay: LogDecay | None = None,
  beta: Gate | None = None,
  gamma: Gate | None = None,
  *,
  clip: float | None = 1.0,
  initial_state: ResidualState | None = None,
  segment_ids: Segments | None = None,
  finite: bool = False,
  readout: Readout = 'gated',
  chunk_size: int | None = None,
  implementation: Implementation = None,
) -> tuple[Values, ResidualState]:
  """Residual Linear Attention: additive updates of a base and of a residual state.

  S_t = alpha_t S_{t-1} + beta_t k_t v_t^T, R_t = alpha_t R_{t-1} + gamma_t k_t r_t^T with
  r_t = clip(v_t - S_{t-1}^T k_t), and o_t = alpha_t S_{t-1}^T q_t + gamma_t R_t^T q_t.
  With gamma=None: linear attention, RetNet, simple GLA, Mamba-2's recurrence, GLA.
  """
  return _run(
    'additive', q, k, v, log_decay, beta, gamma, clip=clip, initial_state=initial_state,
    segment_ids=segment_ids, finite=finite, readout=readout, chunk_size=chunk_size,
    implementation=implementation,
  )  # fmt: skip


@_documented
def residual_delta_rule(
  q: Queries,
  k: Queries,
  v: Values,
  log_decay: LogDecay | None = None,
  beta: Gate | None = None,
  gamma: Gate | None = None,
  *,
  clip: float | None = 1.0,
  initial_state: ResidualState | None = None,
  segment_ids: Segments | None = None,
  finite: bool = False,
  readout: Readout = 'gated',
  chunk_size: int | None = None,
  implementation: Implementation = None,
) -> tuple[Values, ResidualState]:
  """Residual Delta Net: delta-rule updates of a base and of a residual state.

  S_t = (I - beta_t k_t k_t^T) alpha_t S_{t-1} + beta_t k_t v_t^T, the same for R_t with gamma_t and
  r_t = clip(v_t - S_{t-1}^T k_t), and o_t = alpha_t S_{t-1}^T q_t + gamma_t R_t^T q_t.
  With gamma=None: DeltaNet, Gated DeltaNet, Kimi Delta Attention.
  """
  return _run(
    'delta', q, k, v, log_decay, beta, gamma, clip=clip, initial_state=initial_state,
    segment_ids=segment_ids, finite=finite, readout=readout, chunk_size=chunk_size,
    implementation=implementation,
  )  # fmt: skip


def residual_linear_attention_step(
  q: Float[Array, 'B G K'],
  k: Float[Array, 'B G K'],
  v: Float[Array, 'B H V'],
  log_decay: Float[Array, 'B H'] | Float[Array, 'B H K'] | None,
  beta: Float[Array, 'B H'] | None,
  gamma: Float[Array, 'B H'] | None,
  state: ResidualState,
  *,
  clip: float | None = 1.0,
  readout: Readout = 'gated',
  implementation: Implementation = None,
) -> tuple[Float[Array, 'B H V'], ResidualState]:
  """One token of `residual_linear_attention`, for decoding: arguments without their time axis.

  Differentiable. `implementation` is None for the best on this platform, 'reference', 'triton' or
  'pallas'. Returns o [B, H, V] in v's dtype and the new state; raises as the operator does.
  """
  return _step(
    'additive', q, k, v, log_decay, beta, gamma, state, clip=clip, readout=readout,
    implementation=implementation,
  )  # fmt: skip


def residual_delta_rule_step(
  q: Float[Array, 'B G K'],
  k: Float[Array, 'B G K'],
  v: Float[Array, 'B H V'],
  log_decay: Float[Array, 'B H'] | Float[Array, 'B H K'] | None,
  beta: Float[Array, 'B H'] | None,
  gamma: Float[Array, 'B H'] | None,
  state: ResidualState,
  *,
  clip: float | None = 1.0,
  readout: Readout = 'gated',
  implementation: Implementation = None,
) -> tuple[Float[Array, 'B H V'], ResidualState]:
  """One token of `residual_delta_rule`, for decoding: arguments without their time axis.

  Differentiable. `implementation` is None for the best on this platform, 'reference', 'triton' or
  'pallas'. Returns o [B, H, V] in v's dtype and the new state; raises as the operator does.
  """
  return _step(
    'delta', q, k, v, log_decay, beta, gamma, state, clip=clip, readout=readout,
    implementation=implementation,
  )  # fmt: skip


_UPDATES = {'residual_linear_attention': 'additive', 'residual_delta_rule': 'delta'}


def explain_implementations(operator: str | Callable, *args, **kwargs) -> dict[str, str | None]:
  """Why each implementation cannot serve a call, None where it can: `{'triton': 'the Triton ...'}`.

  Args:
    operator: `residual_linear_attention` or `residual_delta_rule`, or the name of one.
    *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
    **kwargs: its keyword arguments; `implementation` is ignored.

  Raises:
    ValueError: an unknown operator, or bad arguments.
  """
  kwargs.pop('implementation', None)
  return _abstractly(dispatch.reasons, operator, args, kwargs)


def select_implementation(operator: str | Callable, *args, **kwargs) -> str:
  """Name of the implementation that a call would use, without running it.

  Args:
    operator: `residual_linear_attention` or `residual_delta_rule`, or the name of one.
    *args: its arguments, arrays or `jax.ShapeDtypeStruct`s.
    **kwargs: its keyword arguments, `implementation` among them.

  Raises:
    ValueError: an unknown operator, or bad arguments.
    NotImplementedError: as the operator would.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from rla_jax import ops
    >>> x = jax.ShapeDtypeStruct((2, 4096, 16, 128), jnp.bfloat16)
    >>> ops.select_implementation('residual_delta_rule', x, x, x, implementation='reference')
    'reference'
  """
  implementation = kwargs.pop('implementation', None)

  def select(inputs, options):
    return dispatch.select(inputs, options, implementation)

  return _abstractly(select, operator, args, kwargs)


def states_at(
  operator: Callable,
  positions: Sequence[int],
  *args,
  initial_state: ResidualState | None = None,
  segment_ids: Segments | None = None,
  **kwargs,
) -> tuple[Values, list[ResidualState]]:
  """Runs an operator and returns the states before chosen positions, for prefix caching.

  Args:
    operator: `residual_linear_attention` or `residual_delta_rule`.
    positions: static, increasing, each in [0, T]: state i is that before token `positions[i]`, i.e.
      after `positions[i]` tokens.
    *args: q, k, v and gates as the operator takes them.
    initial_state: as the operator takes it.
    segment_ids: as the operator takes it.
    **kwargs: the operator's other keyword arguments.

  Returns:
    o [B, T, H, V] and one state a position. Continue from state i with the tokens from
    `positions[i]` on.

  Raises:
    ValueError: positions that are not increasing or not within [0, T].
  """
  length = args[2].shape[1]
  positions = [int(p) for p in positions]
  if positions != sorted(set(positions)) or any(p < 0 or p > length for p in positions):
    raise ValueError(f'positions is {positions}; expected increasing integers within [0, {length}]')
  cuts = [0, *(p for p in positions if 0 < p < length), length]
  state, outputs, found = initial_state, [], {}
  for start, stop in itertools.pairwise(cuts):
    ids = None
    if segment_ids is not None:
      ids = segment_ids[:, start:stop]
      if start:
        # The state of a document that ended at the cut must not reach the next one.
        ended_B = segment_ids[:, start] != segment_ids[:, start - 1]
        state = jax.tree.map(lambda s, e=ended_B: jnp.where(e[:, None, None, None], 0, s), state)
    piece = [None if x is None else x[:, start:stop] for x in args]
    o_BTHV, final = operator(*piece, initial_state=state, segment_ids=ids, **kwargs)
    found.setdefault(start, state)
    found[stop], state = final, final
    outputs.append(o_BTHV)
  if found[0] is None:
    found[0] = jax.tree.map(jnp.zeros_like, state)
  return jnp.concatenate(outputs, axis=1), [found[p] for p in positions]


def _run(update, q, k, v, *gates, implementation, **options) -> tuple[Values, ResidualState]:
  inputs, options = canonicalise(update, q, k, v, *gates, **options)
  name = dispatch.select(inputs, options, implementation)
  if v.size == 0:
    return v, inputs.state
  o_BTHV, state = _compute(inputs, dispatch.module(name).run, options)
  return o_BTHV.astype(v.dtype), state


def _step(update, q, k, v, log_decay, beta, gamma, state, *, implementation, **options):
  inputs, options = canonicalise_step(update, q, k, v, log_decay, beta, gamma, state, **options)
  name = dispatch.select_step(inputs, options, implementation)
  o_BHV, state = _compute(inputs, dispatch.module(name).run_step, options)
  return o_BHV.astype(v.dtype), state


# A call outside of jit compiles once, not operation by operation; inside it, nothing changes.
@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _compute(inputs: Inputs, run: Callable, options: Options):
  if inputs.segments is None:
    return run(inputs, options)
  return segments.isolate(lambda inputs: run(inputs, options), inputs, options.finite)


def _abstractly(question: Callable[[Inputs, Options], object], operator, args, kwargs):
  """Asks a question about a call without computing anything."""
  name = operator
  if not isinstance(operator, str):
    name = getattr(operator, '__name__', type(operator).__name__)
  if name not in _UPDATES:
    raise ValueError(f'operator is {name!r}; expected one of {list(_UPDATES)}')
  defaults = {
    'clip': 1.0, 'initial_state': None, 'segment_ids': None, 'finite': False, 'readout': 'gated',
    'chunk_size': None,
  }  # fmt: skip
  names = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma')
  unknown = set(kwargs) - set(defaults) - set(names)
  if unknown:
    raise ValueError(f'unknown arguments {sorted(unknown)}; expected those of {name}')
  tokens = {key: kwargs.pop(key) for key in names if key in kwargs}
  options = ('clip', 'finite', 'readout', 'chunk_size')
  static = {key: kwargs.pop(key) for key in options if key in kwargs}
  answer = []

  def trace(args, tokens, arrays):
    named = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | tokens
    answer.append(question(*canonicalise(_UPDATES[name], **named, **(defaults | static | arrays))))

  jax.eval_shape(trace, args, tokens, kwargs)
  return answer[0]
