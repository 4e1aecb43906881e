"""Parts of a sequence that are walked side by side: the states that come into them (`split`)."""

import jax
import jax.numpy as jnp

from rla_jax.kernels.residual.gpu.blocks import Kernel
from rla_jax.kernels.residual.gpu.split import combine_kernel, transitions_kernel
from rla_jax.kernels.residual.gpu.tiles import BASE_IN

# Parts are combined one after the other, so small tiles: many programs. Three stages save 6 %
# of this on an H200, and do not fit cards with 99 KB of shared memory.
COMBINE = Kernel(16, 8, 2)


class Parts:
  """The parts of a sequence, and the states [B, H, split, K, V] that come into them."""

  def __init__(self, call, prepared, first_span, spans, split, *, adjoint):
    self.call, self.split, self.adjoint = call, split, adjoint
    config = call.config
    self.states = 1 + config.residual
    squares, gates = prepared
    first, chunks = first_span * config.blocks.span, spans * config.blocks.span
    if config.delta:
      block = config.blocks.sweep
      shape = (call.B, call.H, split, self.states, call.K, call.K)
      self.transitions = call.launch(
        transitions_kernel,
        *(call.k, squares, gates, call.T, first, chunks),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        programs=call.pairs * split * self.states * -(-call.K // block.value),
        block=block,
        C=config.blocks.chunk,
        SPLIT=split,
        MATRICES=squares.shape[3],
        STATES=self.states,
        ADJOINT=adjoint,
      )
    else:
      decay = gates[:, :, first : first + chunks, BASE_IN.value, -1]
      each = -(-chunks // config.blocks.span // split) * config.blocks.span
      decay = jnp.pad(decay, ((0, 0), (0, 0), (0, split * each - chunks)), constant_values=1)
      self.transitions = decay.reshape(*decay.shape[:2], split, each).prod(-1)

  def at_edge(self, state):
    """A state for the part where the walk begins, zeros for the others."""
    others = (self.split - 1, 0) if self.adjoint else (0, self.split - 1)
    return jnp.pad(state[:, :, None], ((0, 0), (0, 0), others, (0, 0), (0, 0)))

  def combine(self, edge, ends, state):
    """What comes into every part from what leaves them if they start `at_edge`."""
    return self.call.launch(
      combine_kernel,
      *(edge, ends, self.transitions),
      out_shape=jax.ShapeDtypeStruct(edge.shape, jnp.float32),
      programs=self.call.walk(COMBINE),
      block=COMBINE,
      C=0,
      SPLIT=self.split,
      STATES=self.states,
      STATE=state,
      ADJOINT=self.adjoint,
    )
