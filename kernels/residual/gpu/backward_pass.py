"""The backward pass in pieces of the sequence, the last one first: sweeps, then gradients.

`sweep` walks the chunks for the residual state and then for the base state, several parts of a
piece side by side where heads are few (`split`); `queries` and `keys` are parallel over chunks.
Gradients take the place of what is saved and not read again.
"""

import functools

import jax
import jax.numpy as jnp

from rla_jax.kernels.residual.gpu.batching import fold_into_batch
from rla_jax.kernels.residual.gpu.context import INPUTS, OUTPUTS, SAVED, Call, Config, array
from rla_jax.kernels.residual.gpu.keys import keys_kernel
from rla_jax.kernels.residual.gpu.partition import over_batch_and_heads
from rla_jax.kernels.residual.gpu.parts import Parts
from rla_jax.kernels.residual.gpu.queries import queries_kernel
from rla_jax.kernels.residual.gpu.sweep import sweep_kernel


@functools.cache
def backward(config: Config):
  """Function of inputs, what is saved and cotangents that returns the gradients of `attend`."""

  def run(inputs, saved, cotangents):
    call = Call(config, *inputs)
    do, dbase, dresidual = cotangents
    names = ('dq', 'dk', 'dv', 'dlog_decay', 'dbeta', 'dgamma')
    found = dict.fromkeys(names)
    size = call.piece()
    for first in reversed(range(0, call.spans, size)):
      piece = (first, min(size, call.spans - first))
      dstates, dwritten, dbase, dresidual = _sweeps(call, do, saved, dbase, dresidual, *piece)
      saved, found = _gradients(call, do, saved, dstates, dwritten, found, *piece)
      # One piece after the other, or the scheduler lets all of them live at once.
      later = (saved, found, dbase, dresidual)
      saved, found, dbase, dresidual = jax.lax.optimization_barrier(later)
    found |= {new: getattr(saved, old) for new, old in _replaced(call).items()}
    if not config.residual:
      found['dgamma'] = None
    return *(found[name] for name in names), dbase, dresidual

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
  residual = call.config.residual
  split = call.split(spans, call.config.blocks.sweep)
  prepared = (saved.matrices, saved.gates)
  parts = Parts(call, prepared, first, spans, split, adjoint=True) if split > 1 else None

  def sweep(dstate, dprediction, *, is_residual):
    walk = functools.partial(_sweep, call, do, saved, first, spans, split, dprediction, is_residual)
    if parts is None:
      return walk(dstate, store=True)
    edge = parts.at_edge(dstate)
    *_, ends = walk(edge, store=False)
    *found, dstate = walk(parts.combine(edge, ends, int(is_residual)), store=True)
    return *found, dstate[:, :, 0]

  residual_dstates = dz = dprediction = None
  if residual:
    residual_dstates, dz, dprediction, dresidual = sweep(dresidual, None, is_residual=True)
  dstates, dy, _, dbase = sweep(dbase, dprediction, is_residual=False)
  return (dstates, residual_dstates), (dy, dz, dprediction), dbase, dresidual


def _sweep(call, do, saved, first, spans, split, dprediction, is_residual, dstate, *, store):
  config, block = call.config, call.config.blocks.sweep
  nothing = array((1,), do.dtype)
  states = array((call.B, call.H, spans, call.V, call.K), do.dtype)
  dwritten = array((call.B, spans * call.tokens, call.H, call.V), do.dtype)
  return call.launch(
    sweep_kernel,
    *(call.q, call.k, do, saved.matrices, saved.gates),
    # Any array stands in for one that is not there.
    *(do if x is None else x for x in (dprediction, saved.passes)),
    *(dstate, call.T, first * config.blocks.span, spans * config.blocks.span),
    out_shape=(
      states if store else nothing,
      dwritten if store else nothing,
      dwritten if store and is_residual else nothing,
      array(dstate.shape, jnp.float32),
    ),
    programs=call.walk(block, split),
    block=block,
    C=config.blocks.chunk,
    SPLIT=split,
    STORE=store,
    IS_RESIDUAL=is_residual,
  )


def _replaced(call) -> dict[str, str]:
  """Which errors dk and dv are written over, token by token, as they are not read after that."""
  config = call.config
  found = {'dv': 'base_error'} if config.delta and config.residual else {}
  if call.K == call.V and (config.delta or config.residual):
    found['dk'] = 'residual_error' if config.residual else 'base_error'
  return found


def _gradients(call, do, saved, dstates, dwritten, found, first, spans):
  """The gradients of a piece's inputs, in arrays that all pieces write to.

  `found` holds these from the pieces before, or None. What replaces a saved error is in `saved`,
  which is returned too.
  """
  config, tokens = call.config, (*call.gates, call.segments)
  gate = array((call.B, call.T, call.H), jnp.float32)
  gamma_gate = gate if config.residual else array((1,), jnp.float32)
  keys = array((call.B, call.T, call.H, call.K), do.dtype)
  dscores = array((call.pairs, spans, call.tokens, call.tokens), do.dtype)
  # Without a delta rule the written value is v.
  base_error = call.v if saved.base_error is None else saved.base_error
  forward = {
    'base_error': base_error, 'residual_error': saved.residual_error,
    'states': saved.states, 'residual_states': saved.residual_states,
  }  # fmt: skip

  def run(kernel, block, arrays, outputs):
    """`outputs`: shape by name; what has the name of one of `arrays` is written over that."""
    names = list(arrays)
    results = call.launch(
      kernel,
      # Any array stands in where the kernel does not touch one that is not there.
      *(call.q, call.k, *tokens, *(do if x is None else x for x in arrays.values())),
      *(call.T, first, spans),
      out_shape=tuple(outputs.values()),
      programs=call.pairs * spans,
      block=block,
      C=call.tokens,
      aliases={
        6 + names.index(name): n
        for n, name in enumerate(outputs)
        if name in names and arrays[name] is not None
      },
    )
    return dict(zip(outputs, results, strict=True))

  before = lambda *names: {name: found[name] for name in names}  # noqa: E731
  queried = run(
    queries_kernel, config.blocks.queries,
    {'do': do, **forward, **before('dq', 'dlog_decay', 'dgamma')},
    {'dq': keys, 'dscores': dscores, 'dlog_decay': gate, 'dgamma': gamma_gate},
  )  # fmt: skip
  dscores = queried.pop('dscores')
  found = found | queried
  backward = dict(zip(('dstates', 'residual_dstates'), dstates, strict=True))
  backward |= dict(zip(('dy', 'dz', 'dprediction'), dwritten, strict=True))
  # Where dk and dv take the place of an error, that has the name of the error.
  replaced = _replaced(call)
  dk, dv = (replaced.get(name, name) for name in ('dk', 'dv'))
  new = run(
    keys_kernel, config.blocks.keys,
    {**forward, **backward, 'dscores': dscores,
     **before('dk', 'dv', 'dlog_decay', 'dgamma', 'dbeta')},
    {dk: keys, dv: array(call.v.shape, do.dtype),
     'dlog_decay': gate, 'dgamma': gamma_gate, 'dbeta': gate},
  )  # fmt: skip
  saved = saved._replace(**{name: new.pop(name) for name in replaced.values()})
  return saved, found | new
