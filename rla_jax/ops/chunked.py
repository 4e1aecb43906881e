"""implementation="chunked": matrix products within chunks, a scan over chunks.

Plain JAX, for any platform and any call. The backward pass is a reverse scan that recomputes each
chunk from its inputs and the state before it, and applies the transposed products of
`rla_jax.ops.chunk` with the closed form of its triangular solve. So memory is that of the inputs
and of one state a chunk, and no gradient passes through an inverse.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rla_jax.ops.chunk import advance_chunk
from rla_jax.ops.gram import CHANNEL_BLOCK, boundaries, gram
from rla_jax.ops.inputs import Inputs, Options, repeat_heads
from rla_jax.ops.state import ResidualState
from rla_jax.shapes import Array, Values

# Name of the states before the chunks for rematerialisation policies, as the kernels have it.
STATES_NAME = 'residual_states'

_CHUNK = 64


class Chunks(NamedTuple):
  """The token arrays of a call, cut into chunks; the chunk axis N leads. Heads precede tokens.

  Tokens that fill up the last chunk write nothing: their keys, values and gates are zero.

  Attributes:
    q, k: [N, B, G, C, K].
    v: [N, B, H, C, V].
    log_decay: [N, B, H, C] or [N, B, H, C, K].
    beta, gamma: [N, B, H, C].
    segments: [N, B, C], or None.
    previous: [N, B], the document before the chunk, or None.
  """

  q: Array
  k: Array
  v: Array
  log_decay: Array
  beta: Array
  gamma: Array | None
  segments: Array | None
  previous: Array | None


def unsupported(inputs: Inputs, options: Options) -> str | None:
  """None: it serves every call."""
  del inputs, options
  return None


def run(inputs: Inputs, options: Options) -> tuple[Values, ResidualState]:
  """Runs the recurrence chunk by chunk. Returns o [B, T, H, V] and the final state."""
  length = inputs.v.shape[1]
  chunks = split(inputs, chunk_length(inputs, options, _CHUNK))
  state, o_NBHCV = _scan(options, inputs.state, chunks)
  return merge(o_NBHCV, length), state


def chunk_length(inputs: Inputs, options: Options, default: int) -> int:
  """Tokens of a chunk: never more than there are, whole blocks where a decay has channels."""
  size = min(options.chunk_size or default, inputs.v.shape[1])
  if inputs.log_decay.ndim == 4 and size > CHANNEL_BLOCK:
    size = -(-size // CHANNEL_BLOCK) * CHANNEL_BLOCK
  return size


def split(inputs: Inputs, size: int) -> Chunks:
  """Cuts [B, T, H, ...] into [N, B, H, C, ...]."""
  length = inputs.v.shape[1]
  count = -(-length // size)

  def cut(x, mode='constant'):
    if x is None:
      return None
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, count * size - length)
    x = jnp.pad(x, padding, mode=mode) if count * size > length else x
    x = x.reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def cut_heads(x):
    return None if x is None else jnp.swapaxes(cut(x), 2, 3)

  segments = cut(inputs.segments, 'edge')
  previous = None
  if segments is not None:
    # The initial state belongs to the first document, number 0.
    previous = jnp.concatenate([jnp.zeros_like(segments[:1, :, 0]), segments[:-1, :, -1]])
  tokens = (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta, inputs.gamma)
  return Chunks(*map(cut_heads, tokens), segments, previous)


def merge(o_NBHCV: Array, length: int) -> Values:
  """[N, B, H, C, V] back to [B, T, H, V]."""
  count, batch, heads, size, values = o_NBHCV.shape
  o = o_NBHCV.transpose(1, 0, 3, 2, 4).reshape(batch, count * size, heads, values)
  return o[:, :length]


def chunk_gram(chunk: Chunks, dtype):
  """Gram of one chunk in the states' dtype."""
  heads = chunk.v.shape[1]
  bounds = None if chunk.segments is None else boundaries(chunk.segments, chunk.previous)
  q_BHCK = repeat_heads(chunk.q, heads, axis=1).astype(dtype)
  k_BHCK = repeat_heads(chunk.k, heads, axis=1).astype(dtype)
  return gram(q_BHCK, k_BHCK, chunk.log_decay, bounds)


def precision_of(dtype):
  """Full precision where the caller's values have it; the Gram matrix and the inverse always do."""
  return None if dtype in (jnp.bfloat16, jnp.float16) else 'highest'


def _advance(options: Options, state: ResidualState, chunk: Chunks):
  dtype = state.base.dtype
  state, o_BHCV = advance_chunk(
    chunk_gram(chunk, dtype), state, chunk.v.astype(dtype), chunk.beta, chunk.gamma, options,
    precision_of(chunk.v.dtype),
  )  # fmt: skip
  return state, o_BHCV.astype(chunk.v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: Options, state: ResidualState, chunks: Chunks):
  return jax.lax.scan(functools.partial(_advance, options), state, chunks)


def _scan_forward(options, state, chunks):
  def body(state, chunk):
    after, o = _advance(options, state, chunk)
    return after, (o, state)

  final, (o, before) = jax.lax.scan(body, state, chunks)
  before = checkpoint_name(before, STATES_NAME)
  return (final, o), (before, chunks)


def _scan_backward(options, residuals, cotangents):
  before, chunks = residuals
  d_state, d_o = cotangents

  def body(d_state, step):
    state, chunk, d_o = step
    integers = chunk._replace(
      **dict.fromkeys(('q', 'k', 'v', 'log_decay', 'beta', 'gamma'))
    )  # fmt: skip

    def advance(state, q, k, v, log_decay, beta, gamma):
      floats = {'q': q, 'k': k, 'v': v, 'log_decay': log_decay, 'beta': beta, 'gamma': gamma}
      return _advance(options, state, integers._replace(**floats))

    floats = (chunk.q, chunk.k, chunk.v, chunk.log_decay, chunk.beta, chunk.gamma)
    _, transpose = jax.vjp(advance, state, *floats)
    d_state, *d_floats = transpose((d_state, d_o))
    return d_state, Chunks(*d_floats, None, None)

  return jax.lax.scan(body, d_state, (before, chunks, d_o), reverse=True)


_scan.defvjp(_scan_forward, _scan_backward)
