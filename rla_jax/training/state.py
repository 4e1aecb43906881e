"""The training state, created where it belongs: shapes, then shardings, then arrays."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rla_jax import sharding
from rla_jax.shapes import Array, Int


@flax.struct.dataclass
class TrainState:
  """What a training step takes and returns.

  Attributes:
    step: steps done, those skipped included.
    bad_steps: how many of the last steps, in a row, were skipped for a loss or gradient that was
      not finite.
    params: parameters of the model.
    optimizer: state of the optimiser.
  """

  step: Int[Array, '']
  bad_steps: Int[Array, '']
  params: Any
  optimizer: optax.OptState

  @property
  def progress(self) -> dict:
    """Everything but the parameters, for a checkpoint."""
    return {'step': self.step, 'bad_steps': self.bad_steps, 'optimizer': self.optimizer}


def initializer(model: nn.Module, optimizer: optax.GradientTransformation):
  """The function key -> TrainState before the first step."""

  def init(key: jax.Array) -> TrainState:
    params = model.init(key, jnp.zeros((1, 2), jnp.int32))['params']
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, params, optimizer.init(params))

  return init


def abstract_state(model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh):
  """Shapes, dtypes and shardings of the state: a TrainState of ShapeDtypeStruct.

  Raises:
    ValueError: a parameter that the sharding table does not place; see `sharding.spec_of`.
  """
  shapes = jax.eval_shape(initializer(model, optimizer), jax.random.key(0))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.shardings(shapes, mesh),
  )


def create_state(
  model: nn.Module, optimizer: optax.GradientTransformation, abstract: TrainState, seed: int
) -> TrainState:
  """The state before the first step, each part created on the devices that keep it.

  Its values depend on the seed alone, not on the mesh.
  """
  placed = jax.tree.map(lambda x: x.sharding, abstract)
  return jax.jit(initializer(model, optimizer), out_shardings=placed)(jax.random.key(seed))
