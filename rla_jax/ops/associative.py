"""implementation="associative": all chunks at once, their states by `jax.lax.associative_scan`.

A chunk maps the state before it to the state behind it by S1 = M S0 + F, with a diagonal M for the
additive update and a K x K matrix for the delta rule. Such maps compose associatively, so the
states before all N chunks take O(log N) dependent steps in place of N. The residual state is affine
only once r is known, and r needs the true base states: hence two scans, one after the other.

It costs more than the chunked form: products of transitions, O(T K^2 / C) for the delta rule, and
memory for every chunk at once, in the gradient for every level of the scan too. It pays where the
sequence is long and batch times heads too few to fill a parallel device. On two CPU cores
(`experiments/benchmark_cpu.py`) it never pays for the delta rule; for the additive update, which
has no products of transitions, it takes 0.7 to 0.9 of the chunked form's time forward and backward
up to 1,024 tokens, and more than that form's from 2,048 on.
"""

import functools

import jax
import jax.numpy as jnp

from rla_jax.ops.chunk import carry_state, inverses, read_out, residual_of, write_values
from rla_jax.ops.chunked import chunk_gram, chunk_length, merge, precision_of, split
from rla_jax.ops.inputs import Inputs, Options
from rla_jax.ops.state import ResidualState
from rla_jax.shapes import Array, Values

_CHUNK = 64

Map = tuple[Array, Array]


def unsupported(inputs: Inputs, options: Options) -> str | None:
  """None: it serves every call."""
  del inputs, options
  return None


def compose_dense(first: Map, second: Map) -> Map:
  """`second` after `first`, for S -> M S + F with M [..., K, K] and F [..., K, V]. Associative."""
  (m1, f1), (m2, f2) = first, second
  dot = functools.partial(jnp.matmul, precision='highest')
  return dot(m2, m1), dot(m2, f1) + f2


def compose_diagonal(first: Map, second: Map) -> Map:
  """The same for a diagonal M, given as a column [..., K or 1, 1]. Associative."""
  (m1, f1), (m2, f2) = first, second
  return m2 * m1, m2 * f1 + f2


def run(inputs: Inputs, options: Options) -> tuple[Values, ResidualState]:
  """Runs the recurrence over all chunks at once. Returns o [B, T, H, V] and the final state."""
  dtype = inputs.state.base.dtype
  precision = precision_of(inputs.v.dtype)
  chunks = split(inputs, chunk_length(inputs, options, _CHUNK))
  v = chunks.v.astype(dtype)
  gram = jax.vmap(lambda chunk: chunk_gram(chunk, dtype))(chunks)
  inverse_b, inverse_g = jax.vmap(
    lambda gram, beta, gamma: inverses(gram, beta, gamma, options)
  )(gram, chunks.beta, chunks.gamma)
  write = jax.vmap(functools.partial(write_values, precision=precision))

  base, base_end = _states_before(gram, inverse_b, chunks.beta, v, inputs.state.base)
  u = write(gram, inverse_b, chunks.beta, v, base)
  residual = residual_end = w = None
  if chunks.gamma is not None:
    clipped = functools.partial(residual_of, options=options, precision=precision)
    r = jax.vmap(clipped)(gram, u, v, base)
    residual, residual_end = _states_before(
      gram, inverse_g, chunks.gamma, r, inputs.state.residual
    )
    w = write(gram, inverse_g, chunks.gamma, r, residual)
  read = functools.partial(read_out, options=options, precision=precision)
  o = jax.vmap(read)(gram, chunks.gamma, u, w, ResidualState(base, residual))
  o_BTHV = merge(o, inputs.v.shape[1]).astype(inputs.v.dtype)
  return o_BTHV, ResidualState(base_end, residual_end)


def _states_before(gram, inverse, rate, values, initial_BHKV) -> tuple[Array, Array]:
  """States before every chunk [N, B, H, K, V], and the one behind the last."""

  def behind(gram, inverse, rate, values, state):
    rows = write_values(gram, inverse, rate, values, state, 'highest')
    return carry_state(gram, state, rows, 'highest')

  everywhere = jax.vmap(behind)
  count = values.shape[0]
  nothing = jnp.zeros((count, *initial_BHKV.shape), initial_BHKV.dtype)
  offset = everywhere(gram, inverse, rate, values, nothing)
  if inverse is None:
    maps, compose = (gram.carry, offset), compose_diagonal
  else:
    # The columns of the transition: what becomes of each unit state when no value is written.
    size = initial_BHKV.shape[-2]
    units = jnp.broadcast_to(
      jnp.eye(size, dtype=offset.dtype), (*offset.shape[:-2], size, size)
    )
    no_values = jnp.zeros((*values.shape[:-1], size), values.dtype)
    maps, compose = (everywhere(gram, inverse, rate, no_values, units), offset), compose_dense
  matrix, offset = jax.lax.associative_scan(compose, maps)
  if inverse is None:
    after = matrix * initial_BHKV[None] + offset
  else:
    after = jnp.matmul(matrix, initial_BHKV[None], precision='highest') + offset
  return jnp.concatenate([initial_BHKV[None], after[:-1]]), after[-1]
