"""The training step for devices that are not attached: traced, lowered, compiled, never run.

    mesh = sharding.make_mesh(**config.mesh, devices=described_devices('v5e:16x16'))
    traced = trace_training_step(config, mesh)
    compiled = lower(traced, mesh).compile()
    print(compiled.memory_analysis(), *hlo.collectives(compiled.as_text()), sep='\n')

The state and the batch are shapes and shardings; no array is made. `hlo.py` reads what a
compiled program communicates, `flops.py` counts the arithmetic of a traced one.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rla_jax import sharding
from rla_jax.models import LanguageModel
from rla_jax.training import gpus
from rla_jax.training.config import model_config, settled
from rla_jax.training.errors import ConfigError
from rla_jax.training.evaluate import loss_sums
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.state import abstract_state
from rla_jax.training.step import train_step


def described_devices(topology: str) -> Sequence[jax.Device]:
  """Devices of a TPU slice such as 'v5e:16x16', or GPUs such as 'h200:8', on any host.

  For TPUs, set TPU_SKIP_MDS_QUERY=1 before the first call, or libtpu asks a cloud's metadata
  server, and ALLOW_MULTIPLE_LIBTPU_LOAD=1 if other processes compile at the same time.

  Raises:
    ConfigError: a slice that libtpu does not know, no libtpu, or see `gpus.described_devices`.
  """
  from jax.experimental import topologies

  if not topology.startswith('v'):
    return gpus.described_devices(topology)
  try:
    return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  except RuntimeError as error:
    raise ConfigError(
      f'topology is {topology!r}; expected a slice that libtpu knows, as v5e:16x16 '
      f"(pip install -e '.[tpu]'): {' '.join(str(error).split())[:200]}"
    ) from error


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of a batch [B, T] of `rla_jax.data`."""
  shape = config.data.batch_size, config.data.seq_len
  place = sharding.batch_sharding(mesh)
  dtypes = dict.fromkeys(('tokens', 'targets', 'segment_ids'), jnp.int32)
  dtypes |= {'loss_mask': jnp.float32}
  return {name: jax.ShapeDtypeStruct(shape, x, sharding=place) for name, x in dtypes.items()}


def trace_training_step(
  config: ConfigDict, mesh: Mesh, vocab_size: int | None = None
) -> jax.stages.Traced:
  """The step (state, batch) -> (state, scalars) that `train_and_evaluate` compiles, traced.

  Args:
    config: the whole config; its section `mesh` is not read.
    mesh: from `sharding.make_mesh`, of devices attached or described.
    vocab_size: of the tokenizer; None: config.model.vocab_size.

  Raises:
    ValueError: a parameter that the sharding table cannot place on the mesh.
  """
  config = settled(config, mesh)
  size = config.model.vocab_size if vocab_size is None else vocab_size
  model, optimizer = LanguageModel(model_config(config, size)), make_optimizer(config)
  step = functools.partial(
    train_step, loss_sums=functools.partial(loss_sums, model), optimizer=optimizer, config=config
  )
  state = abstract_state(model, optimizer, mesh, config)
  placed = jax.tree.map(lambda x: x.sharding, state)
  with jax.set_mesh(mesh):
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
    return jitted.trace(state, abstract_batch(config, mesh))


def lower(traced: jax.stages.Traced, mesh: Mesh) -> jax.stages.Lowered:
  """Lowers for the platform of the mesh's devices, whatever the host's own is."""
  platform = mesh.devices.flat[0].platform
  platform = 'cuda' if platform == 'gpu' else platform  # JAX knows 'gpu' only where there is one.
  with jax.set_mesh(mesh):  # some lowering rules ask for the kind of the current device
    return traced.lower(lowering_platforms=(platform,))


def memory(compiled: jax.stages.Compiled) -> int:
  """Bytes that a compiled program needs on each device: arguments, results and temporaries."""
  found = compiled.memory_analysis()
  outside = found.argument_size_in_bytes + found.output_size_in_bytes
  return outside + found.temp_size_in_bytes - found.alias_size_in_bytes
