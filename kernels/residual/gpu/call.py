"""Launches the kernels from JAX: forward, backward in pieces, and their rules for grad and vmap.

Forward: `prepare` and `forward`. Backward: `sweep` for the residual state and then for the base
state, `queries` and `keys`. These and `prepare` are parallel over chunks; the others walk them.
Where heads are few, they walk several parts of a sequence side by side (`split`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rla_jax.kernels.residual.gpu.batching import fold_into_batch
from rla_jax.kernels.residual.gpu.blocks import MULTIPROCESSORS, Blocks, sequence_split
from rla_jax.kernels.residual.gpu.forward import forward_kernel
from rla_jax.kernels.residual.gpu.keys import keys_kernel
from rla_jax.kernels.residual.gpu.launch import launch
from rla_jax.kernels.residual.gpu.partition import over_batch_and_heads
from rla_jax.kernels.residual.gpu.parts import Parts
from rla_jax.kernels.residual.gpu.prepare import matrices, prepare_kernel
from rla_jax.kernels.residual.gpu.queries import queries_kernel
from rla_jax.kernels.residual.gpu.sweep import sweep_kernel
from rla_jax.kernels.residual.gpu.tiles import (
  BASE_IN,
  BASE_OUT,
  BASE_UNDO,
  GATES,
  RESIDUAL_IN,
  RESIDUAL_OUT,
  RESIDUAL_READ,
  RESIDUAL_UNDO,
)

# Names for jax.checkpoint policies: the output, and what the backward pass reads beyond the inputs.
OUTPUT_NAME = 'residual_attention_output'
SAVED_NAME = 'residual_attention_saved'


class Saved(NamedTuple):
  """What the forward pass leaves to the backward pass; None for what a rule has not."""

  states: Any  # before every span of chunks
  residual_states: Any
  base_error: Any  # F of both states
  residual_error: Any
  passes: Any  # where the residual passes the clip: a bit a token, in words of 32 a chunk and value
  matrices: Any
  gates: Any


# Dimensions of what the kernels read and write, for the partitioning rule.
INPUTS = ('BTGK', 'BTGK', 'BTHV', 'BTH', 'BTH', 'BTH', 'BHKV', 'BHKV', 'BT')
OUTPUTS = ('BTHV', 'BHKV', 'BHKV')
SAVED = Saved('BHNVK', 'BHNVK', 'BTHV', 'BTHV', 'BHCWV', 'BHCMIJ', 'BHCRI')


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


class _Call:
  """What all kernels of one call are told: its sizes, its gates, and how to launch."""

  def __init__(self, config, q, k, v, log_decay, beta, gamma, segments):
    self.config = config
    self.q, self.k, self.v = q, k, v
    self.gates = (log_decay, beta, beta if gamma is None else gamma)
    self.segments = log_decay if segments is None else segments
    self.B, self.T, self.G, self.K = k.shape
    self.H, self.V = v.shape[2:]
    self.pairs = self.B * self.H
    self.tokens = config.blocks.chunk * config.blocks.span  # of a parallel kernel's program
    self.spans = -(-self.T // self.tokens)
    self.is_segmented = segments is not None

  def launch(self, kernel, *arguments, out_shape, programs, block, C, aliases=None, **constexprs):
    """Runs a kernel. The constexprs that every kernel or nearly every one has are filled in."""
    known = {
      'H': self.H, 'G': self.G, 'K': self.K, 'V': self.V, 'C': C, 'BLOCK_K': _block(self.K),
      'BLOCK_V': block.value, 'DELTA': self.config.delta, 'RESIDUAL': self.config.residual,
      'CLIP': self.config.clip, 'SPAN': self.config.blocks.span, 'SEGMENTED': self.is_segmented,
      'EVEN': self._is_even(block.value), 'PRECISION': _precision(self.q.dtype),
      'STAGES': block.stages,
    }  # fmt: skip
    names = {p.name for p in kernel.params if p.is_constexpr}
    known = {n: x for n, x in known.items() if n in names} | constexprs
    return launch(
      kernel,
      *arguments,
      out_shape=out_shape,
      grid=(programs,),
      num_warps=block.warps,
      num_stages=block.stages,
      aliases=aliases,
      interpret=self.config.interpret,
      **known,
    )

  def walk(self, block, split=1) -> int:
    """Programs of a kernel that walks the chunks of every head, or of parts of it."""
    return self.pairs * split * -(-self.V // block.value)

  def split(self, spans, block) -> int:
    """Parts of a sequence of so many spans that are walked side by side; none is empty."""
    parts = self.config.blocks.split
    if parts is None:
      parts = sequence_split(self.walk(block), spans, delta=self.config.delta)
    return -(-spans // -(-spans // min(parts, spans)))

  def _is_even(self, block_v):
    """Whether no tile needs a mask."""
    return self.T % self.tokens == 0 and _block(self.K) == self.K and self.V % max(1, block_v) == 0

  def prepare(self):
    """Matrices and gates of all chunks."""
    delta, residual = self.config.delta, self.config.residual
    C, chunks = self.config.blocks.chunk, self.spans * self.config.blocks.span
    log_decay, beta, gamma = self.gates
    is_wide = self.q.dtype == jnp.float32
    return self.launch(
      prepare_kernel,
      *(self.q, self.k, log_decay, beta, gamma, self.segments),
      *(self.T, chunks),
      out_shape=(
        _array(
          (self.B, self.H, chunks, matrices(delta=delta, residual=residual), C, C),
          jnp.float32 if is_wide else jnp.bfloat16,  # `prepare` says why not float16
        ),
        _array((self.B, self.H, chunks, GATES, C), jnp.float32),
      ),
      programs=chunks * self.pairs,
      block=self.config.blocks.prepare,
      C=C,
      # Two bfloat16 parts are exact to 3e-5, far below the rounding of 16-bit results.
      SOLVE='tf32x3' if is_wide else 'parts',
    )


@functools.cache
def _forward(config: Config, save: bool):
  def run(q, k, v, log_decay, beta, gamma, base, residual, segments):
    call = _Call(config, q, k, v, log_decay, beta, gamma, segments)
    prepared = call.prepare()
    split = call.split(call.spans, config.blocks.forward)
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
      _array(v.shape if output else nothing, v.dtype),
      _array(base.shape, jnp.float32),
      _array(base.shape if has_residual else nothing, jnp.float32),
      _array(states if save else nothing, v.dtype),
      _array(states if keep_residual else nothing, v.dtype),
      _array(v.shape if keep_base_error else nothing, v.dtype),
      _array(v.shape if keep_residual else nothing, v.dtype),
      _array(words if keep_passes else nothing, jnp.int32),
    ),
    programs=call.walk(block, split),
    block=block,
    C=config.blocks.chunk,
    MATRICES=squares.shape[3],
    SPLIT=split,
    RESIDUAL=has_residual,
    OUTPUT=output,
    SAVE=save,
    # Where registers allow it. A program with a multiprocessor of its own waits for itself, and the
    # delta rule for its products, most of all; others lose.
    BITS_LAST=block.value >= 64 and (config.delta or call.walk(block, split) <= MULTIPROCESSORS),
  )
  kept = (save, keep_residual, keep_base_error, keep_residual, keep_passes)
  saved = [x if keep else None for x, keep in zip(saved, kept, strict=True)]
  outputs = (o, base_out, residual_out if has_residual else None)
  return outputs, Saved(*saved, squares, gates) if save else None


@functools.cache
def _backward(config: Config):
  def run(inputs, saved, cotangents):
    call = _Call(config, *inputs)
    do, dbase, dresidual = cotangents
    size = -(-call.spans // min(config.blocks.pieces, call.spans))
    found = None
    gates = []
    for first in reversed(range(0, call.spans, size)):
      piece = (first, min(size, call.spans - first))
      dstates, dwritten, dbase, dresidual = _sweeps(call, do, saved, dbase, dresidual, *piece)
      saved, found, piece_gates = _gradients(call, do, saved, dstates, dwritten, found, *piece)
      # One piece after the other, or the scheduler lets all of them live at once.
      later = (saved, found, dbase, dresidual)
      saved, found, dbase, dresidual = jax.lax.optimization_barrier(later)
      gates.append(piece_gates)
    dq, dk, dv = found
    replaced = _replaced(config, call)
    dk = getattr(saved, replaced) if replaced else dk
    dlog_decay, dbeta, dgamma = jax.tree.map(
      lambda *parts: jnp.concatenate(parts[::-1], axis=1)[:, : call.T], *gates
    )
    return dq, dk, dv, dlog_decay, dbeta, dgamma, dbase, dresidual

  *tokens, base, residual, segments = INPUTS
  inputs = ((*tokens, segments), SAVED, OUTPUTS)
  split = over_batch_and_heads(run, inputs, ('BTHK', 'BTHK', *tokens[2:], base, residual))

  def summed(inputs, saved, cotangents):
    dq, dk, *others = split(inputs, saved, cotangents)
    # Out here XLA also adds what the heads of a group give on other devices.
    dq, dk = (_sum_heads(x, like) for x, like in ((dq, inputs[0]), (dk, inputs[1])))
    return dq, dk, *others

  return fold_into_batch(summed)


def _sum_heads(dx_BTHK, x_BTGK):
  """Gradient of queries or keys from those of the value heads that share them."""
  B, T, G, K = x_BTGK.shape
  if dx_BTHK.shape[2] == G:
    return dx_BTHK
  return dx_BTHK.reshape(B, T, G, -1, K).astype(jnp.float32).sum(3).astype(x_BTGK.dtype)


def _sweeps(call, do, saved, dbase, dresidual, first, spans):
  """Gradients of both states after every span, of what was written, and of the prediction."""
  delta, residual = call.config.delta, call.config.residual
  split = call.split(spans, call.config.blocks.sweep)
  prepared = (saved.matrices, saved.gates)
  parts = Parts(call, prepared, first, spans, split, adjoint=True) if split > 1 else None

  def sweep(dprediction, dstate, *places):
    predicted = residual and dprediction is None  # the residual state, to which the base one leads
    walk = functools.partial(
      _sweep, call, do, saved, first, spans, split, dprediction, predicted
    )
    if parts is None:
      return walk(dstate, *places, store=True)
    edge = parts.at_edge(dstate)
    *_, ends = walk(edge, *places, store=False)
    *found, dstate = walk(parts.combine(edge, ends, int(predicted)), *places, store=True)
    return *found, dstate[:, :, 0]

  # Places of scores, inverse and prediction as `matrices` orders them, then rows of the gates.
  residual_dstates = dz = dprediction = None
  if residual:
    residual_dstates, dz, dprediction, dresidual = sweep(
      None, dresidual, 1 + delta, 4, None,
      RESIDUAL_READ.value, RESIDUAL_IN.value, RESIDUAL_OUT.value, RESIDUAL_UNDO.value,
    )  # fmt: skip
  dstates, dy, _, dbase = sweep(
    dprediction, dbase, 0, 1, 2 + delta,
    BASE_IN.value, BASE_IN.value, BASE_OUT.value, BASE_UNDO.value,
  )  # fmt: skip
  return (dstates, residual_dstates), (dy, dz, dprediction), dbase, dresidual


def _sweep(
  call, do, saved, first, spans, split, dprediction, predicted,
  dstate, scores, inverse, prediction, query_read, key_read, out, undo, *, store,
):  # fmt: skip
  config, block = call.config, call.config.blocks.sweep
  C, span = config.blocks.chunk, config.blocks.span
  states = (call.B, call.H, spans, call.V, call.K)
  dwritten = (call.B, spans * span * C, call.H, call.V)
  return call.launch(
    sweep_kernel,
    *(call.q, call.k, do, saved.matrices, saved.gates),
    # Any array stands in for one that is not there.
    *(do if x is None else x for x in (dprediction, saved.passes)),
    *(dstate, call.T, first * span, spans * span),
    out_shape=(
      _array(states if store else (1,), do.dtype),
      _array(dwritten if store else (1,), do.dtype),
      _array(dwritten if store and predicted else (1,), do.dtype),
      _array(dstate.shape, jnp.float32),
    ),
    programs=call.walk(block, split),
    block=block,
    C=C,
    SPLIT=split,
    STORE=store,
    MATRICES=saved.matrices.shape[3],
    SCORES=scores,
    INVERSE=inverse,
    PREDICTION=None if dprediction is None else prediction,
    PREDICTED=predicted,
    QUERY_READ=query_read,
    KEY_READ=key_read,
    OUT=out,
    UNDO=undo,
  )


def _replaced(config, call) -> str | None:
  """The field of `Saved` that dk is written over, token by token, if one has its shape."""
  if call.K != call.V:
    return None
  return 'residual_error' if config.residual else 'base_error' if config.delta else None


def _gradients(call, do, saved, dstates, dwritten, found, first, spans):
  """dq, dk and dv, which all pieces write to, and the gates' gradients.

  `found` holds the first three from the pieces before, or is None. Where dk replaces what is saved,
  it is in `saved`, which is returned too, and None in `found`.
  """
  config, tokens = call.config, (*call.gates, call.segments)
  gate = _array((call.B, spans * call.tokens, call.H), jnp.float32)
  gamma_gate = gate if config.residual else _array((1,), jnp.float32)
  keys = _array((call.B, call.T, call.H, call.K), do.dtype)
  dscores = _array((call.pairs, spans, call.tokens, call.tokens), do.dtype)
  # Without a delta rule the written value is v.
  base_error = call.v if saved.base_error is None else saved.base_error
  forward = {
    'base_error': base_error, 'residual_error': saved.residual_error,
    'states': saved.states, 'residual_states': saved.residual_states,
  }  # fmt: skip

  def run(kernel, block, arrays, places, out_shape):
    """`places`: the arrays that the first outputs are written over; no place if there is none."""
    names = list(arrays)
    return call.launch(
      kernel,
      # Any array stands in where the kernel does not touch one that is not there.
      *(call.q, call.k, *tokens, *(do if x is None else x for x in arrays.values())),
      *(call.T, first, spans),
      out_shape=out_shape,
      programs=call.pairs * spans,
      block=block,
      C=call.tokens,
      aliases={
        6 + names.index(place): n for n, place in enumerate(places) if arrays[place] is not None
      },
    )

  dq, dk, dv = (None, None, None) if found is None else found
  dq, *scores = run(
    queries_kernel, config.blocks.queries, {'do': do, **forward, 'dq': dq}, ('dq',),
    (keys, dscores, gate, gamma_gate),
  )  # fmt: skip
  backward = dict(zip(('dstates', 'residual_dstates'), dstates, strict=True))
  backward |= dict(zip(('dy', 'dz', 'dprediction'), dwritten, strict=True))
  backward |= dict(zip(('dscores', 'dcumulative', 'dgamma'), scores, strict=True))
  replaced = _replaced(config, call)
  dk, dv, dlog_decay, dbeta, dgamma = run(
    keys_kernel, config.blocks.keys, {**forward, **backward, 'dk': dk, 'dv': dv},
    (replaced or 'dk', 'dv'), (keys, _array(call.v.shape, do.dtype), gate, gate, gamma_gate),
  )  # fmt: skip
  if replaced:
    saved, dk = saved._replace(**{replaced: dk}), None
  return saved, (dq, dk, dv), (dlog_decay, dbeta, dgamma if config.residual else None)
