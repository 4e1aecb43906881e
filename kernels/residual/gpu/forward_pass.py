"""The forward pass: `prepare`, which is parallel over chunks, then the walk of the chunks.

`forward` walks them. Where heads are few, the two states of the residual delta rule are walked side
by side (`pair`), and several parts of a sequence are (`split`), of that rule with one state after
the other (`apart`). Large heads are walked with a program a state in any case.
"""

import functools

import jax
import jax.numpy as jnp

from rla_jax.kernels.residual.gpu.apart import base_part_kernel, residual_part_kernel
from rla_jax.kernels.residual.gpu.batching import fold_into_batch
from rla_jax.kernels.residual.gpu.blocks import split_launch, walk_of
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


@functools.cache
def forward(config: Config, save: bool):
  """Function of the inputs that returns outputs and, if asked to, what the backward pass reads."""

  def run(q, k, v, log_decay, beta, gamma, base, residual, segments):
    call = Call(config, q, k, v, log_decay, beta, gamma, segments)
    prepared = call.prepare()
    split = call.split(call.spans, split_launch(config.blocks))
    walk = walk_of(config.blocks, value_dim=call.V, heads=call.pairs, split=split)
    if walk == 'pair':
      return _walk_pair(call, prepared, base, residual, save)
    if split > 1:
      return _walk_parts(call, prepared, split, walk == 'apart', base, residual, save)
    if walk == 'apart':
      return _walk_apart(call, prepared, None, base, residual, save)
    return _walk(call, prepared, config.blocks.forward, 1, base, residual, save=save)

  results = (OUTPUTS, SAVED if save else None)
  return fold_into_batch(over_batch_and_heads(run, INPUTS, results))


def _walk_parts(call, prepared, split, is_apart, base, residual, save):
  """What `_walk` returns, with the parts of every sequence walked side by side."""
  block = call.config.blocks.pair if is_apart else call.config.blocks.forward
  walk = functools.partial(_walk, call, prepared, block, split)
  parts = Parts(call, prepared, 0, call.spans, split, adjoint=False)
  first = parts.at_edge(base)
  (_, ends, _), _ = walk(first, None, output=False)
  base = parts.combine(first, ends, 0)
  if is_apart:
    (o, *final), saved = _walk_apart(call, prepared, parts, base, residual, save)
  else:
    if call.config.residual:
      first = parts.at_edge(residual)
      (_, _, ends), _ = walk(base, first, output=False)
      residual = parts.combine(first, ends, 1)
    (o, *final), saved = walk(base, residual, save=save)
  final = jax.tree.map(lambda x: x[:, :, -1], final)
  return (o, *final), saved


def _walk(call, prepared, block, split, base, residual, *, output=True, save=False):
  """o and final states, and what the backward pass needs; without residual the base state alone."""
  config, v = call.config, call.v
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


class _Handed:
  """Arrays of a walk whose states are in programs of their own: what is saved, what handed over."""

  def __init__(self, call, save):
    config, v, nothing = call.config, call.v, (1,)
    C, chunks = config.blocks.chunk, call.spans * config.blocks.span
    words = (call.B, call.H, chunks, -(-C // 32), call.V)
    handed = (call.B, call.H, chunks, call.V, C)
    self.keeps_base_error = save and config.delta
    self.keeps_passes = save and config.clip is not None
    self.states = array((call.B, call.H, call.spans, call.V, call.K) if save else nothing, v.dtype)
    self.base_error = array(v.shape if self.keeps_base_error else nothing, v.dtype)
    self.residual_error = array(v.shape if save else nothing, v.dtype)
    self.passes = array(words if self.keeps_passes else nothing, jnp.int32)
    # Shares of a bound are as exact in float16 as they need to be, with half the bytes, unless the
    # bound is so far away that all of them are small.
    is_bounded = config.clip is not None and 1e-3 <= config.clip <= 1e3
    is_narrow = is_bounded and v.dtype != jnp.float32
    self.residuals = array(handed, jnp.float16 if is_narrow else jnp.float32)
    self.base_o = array(handed, v.dtype)

  def kept(self, *saved) -> Saved:
    """What a walk saved, without what it had no need to."""
    saved = Saved(*saved)
    return saved._replace(
      base_error=saved.base_error if self.keeps_base_error else None,
      passes=saved.passes if self.keeps_passes else None,
    )


def _walk_pair(call, prepared, base, residual, save):
  """What `_walk` returns, by programs of their own for each state."""
  block, v = call.config.blocks.pair, call.v
  handed = _Handed(call, save)
  state = array(base.shape, jnp.float32)
  flags = call.flags(block)
  o, base, residual, *saved, _, _, _ = call.launch(
    pair_kernel,
    *(call.q, call.k, v, *prepared, base, residual, flags, call.T),
    call.spans * call.config.blocks.span,
    out_shape=(
      *(array(v.shape, v.dtype), state, state, handed.states, handed.states, handed.base_error),
      *(handed.residual_error, handed.passes, handed.residuals, handed.base_o),
      array(flags.shape, flags.dtype),
    ),
    aliases={7: 10},
    programs=2 * call.walk(block),
    block=block,
    C=call.config.blocks.chunk,
    SAVE=save,
  )
  return (o, base, residual), handed.kept(*saved, *prepared) if save else None


def _walk_apart(call, prepared, parts, base, residual, save):
  """The same with a state a launch, of whole sequences or parts [B, H, split, K, V].

  Of parts `base` comes into each of them, `residual` into the first; final states are of each.
  """
  block, v = call.config.blocks.pair, call.v
  chunks = call.spans * call.config.blocks.span
  handed = _Handed(call, save)
  state = array(base.shape, jnp.float32)
  split = 1 if parts is None else parts.split
  launch = functools.partial(
    call.launch, programs=call.walk(block, split), block=block, C=call.config.blocks.chunk,
    SPLIT=split,
  )  # fmt: skip
  base, states, base_error, passes, *given = launch(
    base_part_kernel,
    *(call.q, call.k, v, *prepared, base, call.T, chunks),
    out_shape=(
      *(state, handed.states, handed.base_error, handed.passes, handed.residuals),
      array(v.shape, v.dtype),
    ),
    SAVE=save,
  )

  def follow(residual, *, output, save):
    nothing = array((1,), v.dtype)
    return launch(
      residual_part_kernel,
      *(call.q, call.k, *prepared, residual, *given, call.T, chunks),
      out_shape=(
        array(v.shape, v.dtype) if output else nothing,
        state,
        *((handed.states, handed.residual_error) if save else (nothing, nothing)),
      ),
      aliases={6: 0} if output else None,
      SAVE=save,
      OUTPUT=output,
    )

  if parts is not None:
    first = parts.at_edge(residual)
    _, ends, _, _ = follow(first, output=False, save=False)
    residual = parts.combine(first, ends, 1)
  o, residual, residual_states, residual_error = follow(residual, output=True, save=save)
  saved = (states, residual_states, base_error, residual_error, passes, *prepared)
  return (o, base, residual), handed.kept(*saved) if save else None
