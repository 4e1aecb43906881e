"""Launches the kernels from JAX: forward, backward in pieces, and their rules for grad and vmap."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rla_jax.kernels.residual.gpu.batching import fold_into_batch
from rla_jax.kernels.residual.gpu.blocks import Blocks
from rla_jax.kernels.residual.gpu.forward import forward_kernel
from rla_jax.kernels.residual.gpu.gradients import gradients_kernel
from rla_jax.kernels.residual.gpu.launch import launch
from rla_jax.kernels.residual.gpu.partition import over_batch_and_heads
from rla_jax.kernels.residual.gpu.prepare import matrices, prepare_kernel
from rla_jax.kernels.residual.gpu.sweep import sweep_kernel
from rla_jax.kernels.residual.gpu.tiles import GATES

# Names for jax.checkpoint policies: the output, and what the backward pass reads beyond the inputs.
OUTPUT_NAME = 'residual_attention_output'
SAVED_NAME = 'residual_attention_saved'

# Dimensions of what the kernels read and write, for the partitioning rule.
INPUTS = ('BTGK', 'BTGK', 'BTHV', 'BTH', 'BTH', 'BTH', 'BHKV', 'BHKV', 'BT')
OUTPUTS = ('BTHV', 'BHKV', 'BHKV')
SAVED = ('BHNSVK', 'BTHV', 'BTHV', 'BTHV')


@dataclasses.dataclass(frozen=True)
class Config:
  """What is fixed when a call is compiled."""

  delta: bool
  residual: bool
  clip: float | None
  blocks: Blocks
  interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(config: Config, q, k, v, log_decay, beta, gamma, base, residual, segments):
  """o [B, T, H, V] and the final states; arguments as `residual_attention` takes them."""
  outputs, _ = _forward(config, False)(
    q, k, v, log_decay, beta, gamma, base, residual, segments
  )
  return outputs


def _attend_forward(config, q, k, v, log_decay, beta, gamma, base, residual, segments):
  outputs, saved = _forward(config, True)(
    q, k, v, log_decay, beta, gamma, base, residual, segments
  )
  o, *final = outputs
  saved = jax.tree.map(lambda x: checkpoint_name(x, SAVED_NAME), saved)
  inputs = (q, k, v, log_decay, beta, gamma, segments)
  return (checkpoint_name(o, OUTPUT_NAME), *final), (inputs, saved)


def _attend_backward(config, kept, cotangents):
  inputs, saved = kept
  return (*_backward(config)(inputs, saved, cotangents), None)


attend.defvjp(_attend_forward, _attend_backward)


def _block(size: int) -> int:
  return max(16, 1 << (size - 1).bit_length())


def _precision(dtype) -> str:
  """Of products: exact for 16-bit operands, three passes on the tensor cores for float32."""
  return 'tf32x3' if dtype == jnp.float32 else 'tf32'


def _array(shape, dtype):
  return jax.ShapeDtypeStruct(shape, dtype)


def _prepare(config, q, k, log_decay, beta, gamma, segments, first, chunks, adjoint):
  B, T, G, K = k.shape
  H = beta.shape[-1]
  C = config.blocks.chunk
  M = matrices(delta=config.delta, residual=config.residual)
  return launch(
    prepare_kernel,
    q,
    k,
    log_decay,
    beta,
    beta if gamma is None else gamma,
    log_decay if segments is None else segments,
    T,
    first,
    out_shape=(
      _array((B, H, chunks, M, C, C), q.dtype),
      _array((B, H, chunks, GATES, C), jnp.float32),
    ),
    grid=(chunks * (1 + (config.delta and config.residual)), B * H),
    num_warps=config.blocks.prepare.warps,
    num_stages=config.blocks.prepare.stages,
    interpret=config.interpret,
    H=H,
    G=G,
    K=K,
    C=C,
    BLOCK_K=_block(K),
    DELTA=config.delta,
    RESIDUAL=config.residual,
    SEGMENTED=segments is not None,
    ADJOINT=adjoint,
    PRECISION=_precision(q.dtype),
    # Three passes of bfloat16 are exact to 2e-5, far below the rounding of 16-bit results. Triton's
    # interpreter does not know them.
    SOLVE='tf32x3' if config.interpret or q.dtype == jnp.float32 else 'bf16x3',
  )


@functools.cache
def _forward(config: Config, save: bool):
  def run(q, k, v, log_decay, beta, gamma, base, residual, segments):
    B, T, G, K = k.shape
    H, V = v.shape[2:]
    C, span, blocks = config.blocks.chunk, config.blocks.span, config.blocks.forward
    spans = -(-T // (C * span))
    N = spans * span
    matrices_BHNMCC, gates_BHNRC = _prepare(
      config, q, k, log_decay, beta, gamma, segments, 0, N, False
    )
    states = 1 + config.residual
    has_base_error = save and config.delta
    has_residual_error = save and config.residual
    has_passes = save and config.residual and config.clip is not None
    value, nothing = (B, T, H, V), (1,)
    o, base_out, residual_out, saved, base_error, residual_error, passes = launch(
      forward_kernel,
      q,
      k,
      v,
      matrices_BHNMCC,
      gates_BHNRC,
      base,
      base if residual is None else residual,
      T,
      N,
      out_shape=(
        _array(value, v.dtype),
        _array(base.shape, jnp.float32),
        _array(base.shape if config.residual else nothing, jnp.float32),
        _array((B, H, spans, states, V, K) if save else nothing, v.dtype),
        _array(value if has_base_error else nothing, v.dtype),
        _array(value if has_residual_error else nothing, v.dtype),
        _array(value if has_passes else nothing, jnp.int8),
      ),
      grid=(-(-V // blocks.value), B * H),
      num_warps=blocks.warps,
      num_stages=blocks.stages,
      interpret=config.interpret,
      H=H,
      G=G,
      K=K,
      V=V,
      C=C,
      SPAN=span,
      BLOCK_K=_block(K),
      BLOCK_V=blocks.value,
      DELTA=config.delta,
      RESIDUAL=config.residual,
      CLIP=config.clip,
      SAVE=save,
      EVEN=_is_even(T, C * span, K, V, blocks.value),
      PRECISION=_precision(v.dtype),
    )
    kept = (
      saved,
      base_error if has_base_error else None,
      residual_error if has_residual_error else None,
      passes if has_passes else None,
    )
    outputs = (o, base_out, residual_out if config.residual else None)
    return outputs, kept if save else None

  results = (OUTPUTS, SAVED if save else None)
  return fold_into_batch(over_batch_and_heads(run, INPUTS, results))


def _is_even(T, tokens, K, V, block_v):
  return T % tokens == 0 and _block(K) == K and V % block_v == 0


@functools.cache
def _backward(config: Config):
  def run(inputs, saved, cotangents):
    q, k, v, log_decay, beta, gamma, segments = inputs
    do, dbase, dresidual = cotangents
    B, T, H, _ = v.shape
    G, K = k.shape[2:]
    span = config.blocks.span
    spans = -(-T // (config.blocks.chunk * span))
    size = -(-spans // min(config.blocks.pieces, spans))
    dq_dk_dv = None
    gates = []
    for first in reversed(range(0, spans, size)):
      piece = (first, min(size, spans - first))
      matrices_BHNMCC, gates_BHNRC = _prepare(
        config, q, k, log_decay, beta, gamma, segments, first * span, piece[1] * span, True
      )
      dstates, errors, dbase, dresidual = _sweep(
        config, q, k, do, matrices_BHNMCC, gates_BHNRC, saved[3], dbase, dresidual, *piece
      )
      dq_dk_dv, piece_gates = _gradients(
        config, inputs, do, saved, dstates, errors, dq_dk_dv, *piece
      )
      gates.append(piece_gates)
    dq, dk, dv = dq_dk_dv
    dlog_decay, dbeta, dgamma = jax.tree.map(
      lambda *parts: jnp.concatenate(parts[::-1], axis=1)[:, :T], *gates
    )
    if G != H:
      dq, dk = (
        x.reshape(B, T, G, H // G, K).astype(jnp.float32).sum(3).astype(q.dtype) for x in (dq, dk)
      )
    return dq, dk, dv, dlog_decay, dbeta, dgamma, dbase, dresidual

  *tokens, base, residual, segments = INPUTS
  inputs = ((*tokens, segments), SAVED, OUTPUTS)
  return fold_into_batch(over_batch_and_heads(run, inputs, (*tokens, base, residual)))


def _sweep(config, q, k, do, matrices_BHNMCC, gates_BHNRC, passes, dbase, dresidual, first, spans):
  B, T, H, V = do.shape
  G, K = k.shape[2:]
  C, span, blocks = config.blocks.chunk, config.blocks.span, config.blocks.sweep
  value, nothing = (B, spans * span * C, H, V), (1,)
  residual = config.residual
  dstates, dy, dz, dinnovation, dbase, dresidual = launch(
    sweep_kernel,
    q,
    k,
    do,
    matrices_BHNMCC,
    gates_BHNRC,
    do if passes is None else passes,
    dbase,
    dresidual if residual else dbase,
    T,
    first * span,
    spans * span,
    out_shape=(
      _array((B, H, spans, 1 + residual, V, K), do.dtype),
      _array(value, do.dtype),
      _array(value if residual else nothing, do.dtype),
      _array(value if residual else nothing, do.dtype),
      _array(dbase.shape, jnp.float32),
      _array(dbase.shape if residual else nothing, jnp.float32),
    ),
    grid=(-(-V // blocks.value), B * H),
    num_warps=blocks.warps,
    num_stages=blocks.stages,
    interpret=config.interpret,
    H=H,
    G=G,
    K=K,
    V=V,
    C=C,
    SPAN=span,
    BLOCK_K=_block(K),
    BLOCK_V=blocks.value,
    DELTA=config.delta,
    RESIDUAL=residual,
    CLIP=config.clip,
    EVEN=_is_even(T, C * span, K, V, blocks.value),
    PRECISION=_precision(do.dtype),
  )
  return dstates, (dy, dz, dinnovation), dbase, dresidual if residual else None


def _gradients(config, inputs, do, saved, dstates, errors, before, first, spans):
  q, k, v, log_decay, beta, gamma, segments = inputs
  states, base_error, residual_error, _ = saved
  B, T, H, V = v.shape
  G, K = k.shape[2:]
  C, blocks = config.blocks.chunk * config.blocks.span, config.blocks.gradients
  # Without a delta rule the written value is v, that of the residual state r.
  base_error = v if base_error is None else base_error
  gate = _array((B, spans * C, H), jnp.float32)
  arrays = (
    q,
    k,
    log_decay,
    beta,
    beta if gamma is None else gamma,
    log_decay if segments is None else segments,
    do,
    base_error,
    base_error if residual_error is None else residual_error,
    states,
    dstates,
    *errors,
  )
  place = len(arrays)
  dq, dk, dv, dlog_decay, dbeta, dgamma = launch(
    gradients_kernel,
    *arrays,
    *((q, k, v) if before is None else before),
    T,
    first,
    out_shape=(
      _array((B, T, H, K), q.dtype),
      _array((B, T, H, K), k.dtype),
      _array((B, T, H, V), v.dtype),
      gate,
      gate,
      gate if config.residual else _array((1,), jnp.float32),
    ),
    grid=(spans, B * H),
    num_warps=blocks.warps,
    num_stages=blocks.stages,
    aliases=None if before is None else {place: 0, place + 1: 1, place + 2: 2},
    interpret=config.interpret,
    H=H,
    G=G,
    K=K,
    V=V,
    C=C,
    BLOCK_K=_block(K),
    BLOCK_V=blocks.value,
    DELTA=config.delta,
    RESIDUAL=config.residual,
    SEGMENTED=segments is not None,
    EVEN=_is_even(T, C, K, V, blocks.value),
    PRECISION=_precision(v.dtype),
  )
  return (dq, dk, dv), (dlog_decay, dbeta, dgamma if config.residual else None)
