"""GPUs that are not attached, as XLA's compiler for them wants them described.

Neither a card nor a driver is needed, only JAX's package for CUDA: XLA compiles for a description
(jax.experimental.topologies, `target_config`). Without a card it cannot time candidates, so it
takes its own first choice for products and fusions; memory and communication do not depend on it.
"""

import importlib.util
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rla_jax.training.errors import ConfigError
from rla_jax.training.utilisation import PEAKS


class Gpu(NamedTuple):
  """What the compiler asks of a GPU beside its memory; figures of its maker, sizes in bytes.

  Attributes:
    kind: its name, as JAX gives it.
    capability: major version of its instructions.
    cores: multiprocessors.
    lanes: float32 units of each.
    shared: memory of each that its programs share.
    cache: second-level cache.
    clock: GHz at most.
  """

  kind: str
  capability: int
  cores: int
  lanes: int
  shared: int
  cache: int
  clock: float


_KB, _MB = 2**10, 2**20
GPUS = {
  'a100': Gpu('NVIDIA A100-SXM4-80GB', 8, 108, 64, 164 * _KB, 40 * _MB, 1.41),
  'h100': Gpu('NVIDIA H100 80GB HBM3', 9, 132, 128, 228 * _KB, 50 * _MB, 1.98),
  'h200': Gpu('NVIDIA H200', 9, 132, 128, 228 * _KB, 50 * _MB, 1.98),
}


def described_devices(topology: str) -> Sequence[jax.Device]:
  """The GPUs of one node, such as 'h200:8'.

  Raises:
    ConfigError: another GPU or form, or the package is missing.
  """
  from jax.experimental import topologies

  found = re.fullmatch(rf'({"|".join(GPUS)}):([1-8])', topology)
  if found is None:
    raise ConfigError(
      f'topology is {topology!r}; expected a TPU slice as v5e:16x16, or 1 to 8 GPUs of a node as '
      f'h200:8, of {", ".join(GPUS)}'
    )
  if not any(importlib.util.find_spec(f'jax_cuda{n}_plugin') for n in (12, 13)):
    raise ConfigError(
      f"topology is {topology!r}, which needs JAX's compiler for CUDA, though no GPU: "
      "pip install -e '.[cuda]'"
    )
  name, count = found.groups()
  return topologies.get_topology_desc(
    platform='cuda', topology=f'1x1x{count}', target_config=_target(GPUS[name])
  ).devices


def _target(gpu: Gpu) -> str:
  """A GpuTargetConfigProto; what is not a field here is the same for all of them."""
  peak = PEAKS[gpu.kind]
  return f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {gpu.capability} }}
      core_count: {gpu.cores}
      fpus_per_core: {gpu.lanes}
      shared_memory_per_core: {gpu.shared}
      shared_memory_per_block_optin: {gpu.shared - _KB}
      l2_cache_size: {gpu.cache}
      clock_rate_ghz: {gpu.clock}
      device_memory_size: {int(peak.memory)}
      memory_bandwidth: {int(peak.memory_rate)}
      shared_memory_per_block: {48 * _KB}
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      threads_per_warp: 32
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 }}
    runtime_version {{ major: 12 minor: 8 }}
    device_description_str: "{gpu.kind}"
  """
