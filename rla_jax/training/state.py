"""The training state, created where it belongs: shapes, then shardings, then arrays."""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from rla_jax import sharding
from rla_jax.shapes import Array, Float, Int


@flax.struct.dataclass
class TrainState:
  """What a training step takes and returns.

  Attributes:
    step: steps done, those skipped included.
    bad_steps: how many of the last steps, in a row, were skipped for a loss or gradient that was
      not finite.
    params: parameters of the model.
    optimizer: state of the optimiser.
    ema: running mean of the parameters; None: not kept.
    usual_norm: running mean of the gradient norm, 0 before the first step; None: not kept.
  """

  step: Int[Array, '']
  bad_steps: Int[Array, '']
  params: Any
  optimizer: optax.OptState
  ema: Any = None
  usual_norm: Float[Array, ''] | None = None

  @property
  def progress(self) -> dict:
    """Everything but parameters and their mean, for a checkpoint."""
    names = ('step', 'bad_steps', 'optimizer', 'usual_norm')
    return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

  @property
  def items(self) -> dict:
    """The parts of a checkpoint by name: params, ema where it is kept, progress."""
    ema = {} if self.ema is None else {'ema': self.ema}
    return {'params': self.params, **ema, 'progress': self.progress}

  @property
  def evaluated(self):
    """The parameters that evaluations take: their mean where it is kept."""
    return self.params if self.ema is None else self.ema


def initial_params(model: nn.Module, key: jax.Array):
  """Parameters before the first step; to be traced.

  Outside of the mesh in force: the tokens that the modules see here are too few to be divided.
  """
  with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
    return model.init(key, jnp.zeros((1, 2), jnp.int32))['params']


def initializer(
  model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict | None = None
):
  """The function key -> TrainState before the first step; config says what else it keeps."""

  def init(key: jax.Array) -> TrainState:
    params = initial_params(model, key)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, params, optimizer.init(params))
    if config is not None and config.ema_decay is not None:
      state = state.replace(ema=jax.tree.map(jnp.copy, params))
    if config is not None and config.max_spike is not None:
      state = state.replace(usual_norm=jnp.zeros((), jnp.float32))
    return state

  return init


def abstract_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  config: ConfigDict | None = None,
):
  """Shapes, dtypes and shardings of the state: a TrainState of ShapeDtypeStruct.

  Raises:
    ValueError: a parameter that the sharding table does not place; see `sharding.spec_of`.
  """
  return _abstract(initializer(model, optimizer, config), mesh)


def abstract_params(model: nn.Module, mesh: Mesh):
  """The same of the parameters alone; raises as `abstract_state` does."""
  return _abstract(functools.partial(initial_params, model), mesh)


def _abstract(init, mesh):
  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.shardings(shapes, mesh),
  )


def create_state(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  abstract: TrainState,
  seed: int,
  config: ConfigDict | None = None,
) -> TrainState:
  """The state before the first step, each part created on the devices that keep it.

  Its values depend on the seed alone, not on the mesh.
  """
  placed = jax.tree.map(lambda x: x.sharding, abstract)
  init = initializer(model, optimizer, config)
  return jax.jit(init, out_shardings=placed)(jax.random.key(seed))
