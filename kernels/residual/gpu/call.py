"""The operator for JAX, with its gradient, and the forward pass: `prepare`, then `forward`.

`prepare` is parallel over chunks, `forward` walks them. Where heads are few, it walks several parts
of a sequence side by side (`split`), or two states do (`pair`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rla_jax.kernels.residual.gpu.backward_pass import backward
from rla_jax.kernels.residual.gpu.batching import fold_into_batch
from rla_jax.kernels.residual.gpu.blocks import walks_in_pairs
from rla_jax.kernels.residual.gpu.context import (
  INPUTS,
  OUTPUTS,
  SAVED,
  Call,
  Config,
  Saved,
  array,
)
from rla_jax.kernels.residual.gpu.forward import forward_kernel
from rla_jax.kernels.residual.gpu.pair import pair_kernel
from rla_jax.kernels.residual.gpu.partition import over_batch_and_heads
from rla_jax.kernels.residual.gpu.parts import Parts

# Names for jax.checkpoint policies: the output, and what the backward pass reads beyond the inputs.
OUTPUT_NAME = 'residual_attention_output'
SAVED_NAME = 'residual_attention_saved'


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
  return (*backward(config)(inputs, saved, cotangents), None)


attend.defvjp(_attend_forward, _attend_backward)


@functools.cache
def _forward(config: Config, save: bool):
  def run(q, k, v, log_decay, beta, gamma, base, residual, segments):
    call = Call(config, q, k, v, log_decay, beta, gamma, segments)
    prepared = call.prepare()
    split = call.split(call.spans, config.blocks.forward)
    if walks_in_pairs(config.blocks, value_dim=call.V, heads=call.pairs, split=split):
      return _walk_pair(call, prepared, base, residual, save)
    walk = functools.partial(_walk, call, prepared, split)
    if split > 1:
      parts = Parts(call, prepared, 0, call.spans, split, adjoint=False)
      first = parts.at_edge(base)
      (_, ends, _), _ = walk(first, None, output=False, save=False)
      base = parts.combine(first, ends, 0)
      if config.residual:
        first = parts.at_edge(residual)
        (_, _, ends), _ = walk(base, first, output=False, save=False)
        residual = parts.combine(first, ends, 1)
    (o, *final), saved = walk(base, residual, output=True, save=save)
    if split > 1:
      final = jax.tree.map(lambda x: x[:, :, -1], final)
    return (o, *final), saved

  results = (OUTPUTS, SAVED if save else None)
  return fold_into_batch(over_batch_and_heads(run, INPUTS, results))


def _walk(call, prepared, split, base, residual, *, output, save):
  """o and final states, and what the backward pass needs; without residual the base state alone."""
  config, block, v = call.config, call.config.blocks.forward, call.v
  squares, gates = prepared
  has_residual = residual is not None
  keep_base_error = save and config.delta
  keep_residual = save and has_residual
  keep_passes = keep_residual and config.clip is not None
  states, nothing = (call.B, call.H, call.spans, call.V, call.K), (1,)
  chunks = call.spans * config.blocks.span
  words = (call.B, call.H, chunks, -(-config.blocks.chunk // 32), call.V)
  o, base_out, residual_out, *saved = call.launch(
    forward_kernel,
    *(call.q, call.k, v, squares, gates, base, residual if has_residual else base),
    *(call.T, chunks),
    out_shape=(
      array(v.shape if output else nothing, v.dtype),
      array(base.shape, jnp.float32),
      array(base.shape if has_residual else nothing, jnp.float32),
      array(states if save else nothing, v.dtype),
      array(states if keep_residual else nothing, v.dtype),
      array(v.shape if keep_base_error else nothing, v.dtype),
      array(v.shape if keep_residual else nothing, v.dtype),
      array(words if keep_passes else nothing, jnp.int32),
    ),
    programs=call.walk(block, split),
    block=block,
    C=config.blocks.chunk,
    MATRICES=squares.shape[3],
    SPLIT=split,
    RESIDUAL=has_residual,
    OUTPUT=output,
    SAVE=save,
    BITS_LAST=config.blocks.bits_last,
  )
  kept = (save, keep_residual, keep_base_error, keep_residual, keep_passes)
  saved = [x if keep else None for x, keep in zip(saved, kept, strict=True)]
  outputs = (o, base_out, residual_out if has_residual else None)
  return outputs, Saved(*saved, squares, gates) if save else None


def _walk_pair(call, prepared, base, residual, save):
  """What `_walk` returns, by programs of their own for each state."""
  config, block, v = call.config, call.config.blocks.pair, call.v
  squares, gates = prepared
  C, chunks = config.blocks.chunk, call.spans * config.blocks.span
  keep_passes = save and config.clip is not None
  nothing = (1,)
  states = array((call.B, call.H, call.spans, call.V, call.K) if save else nothing, v.dtype)
  error = array(v.shape if save else nothing, v.dtype)
  state = array(base.shape, jnp.float32)
  words = (call.B, call.H, chunks, -(-C // 32), call.V)
  handed = (call.B, call.H, chunks, call.V, C)
  # Shares of a bound are as exact in float16 as they need to be, with half the bytes, unless the
  # bound is so far away that all of them are small.
  is_bounded = config.clip is not None and 1e-3 <= config.clip <= 1e3
  is_narrow = is_bounded and v.dtype != jnp.float32
  flags = call.flags(block)
  o, base, residual, *saved, _, _, _ = call.launch(
    pair_kernel,
    *(call.q, call.k, v, squares, gates, base, residual, flags, call.T, chunks),
    out_shape=(
      *(array(v.shape, v.dtype), state, state, states, states, error, error),
      array(words if keep_passes else nothing, jnp.int32),
      array(handed, jnp.float16 if is_narrow else jnp.float32),
      array(handed, v.dtype),
      array(flags.shape, flags.dtype),
    ),
    aliases={7: 10},
    programs=2 * call.walk(block),
    block=block,
    C=C,
    SAVE=save,
  )
  if not keep_passes:
    saved[-1] = None
  return (o, base, residual), Saved(*saved, squares, gates) if save else None
