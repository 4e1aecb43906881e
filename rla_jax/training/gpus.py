"""GPUs that are not attached, as XLA's compiler for them wants them described."""

import importlib.util
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from rla_jax.training.errors import ConfigError
from rla_jax.training.utilisation import PEAKS


class Gpu(NamedTuple):
  """What the compiler asks of a GPU, beside its memory; figures of its maker, sizes in bytes.

  Attributes:
    kind: its name, as JAX gives it.
    capability: version of its instructions.
    cores: multiprocessors.
    shared: memory of a multiprocessor that its programs share.
    cache: second-level cache.
    clock: GHz at most.
  """

  kind: str
  capability: int
  cores: int
  shared: int
  cache: int
  clock: float


_KB, _MB = 2**10, 2**20
GPUS = {
  'a100': Gpu('NVIDIA A100-SXM4-80GB', 8, 108, 164 * _KB, 40 * _MB, 1.41),
  'h100': Gpu('NVIDIA H100 80GB HBM3', 9, 132, 228 * _KB, 50 * _MB, 1.98),
  'h200': Gpu('NVIDIA H200', 9, 132, 228 * _KB, 50 * _MB, 1.98),
}


def described_devices(topology: str) -> Sequence[jax.Device]:
  """Devices of 'h200:8', one node, or 'h200:4x8', four nodes; needs JAX's package for CUDA, no GPU.

  Raises:
    ConfigError: another GPU or form, or the package is missing.
  """
  from jax.experimental import topologies

  found = re.fullmatch(rf'({"|".join(GPUS)}):(?:(\d+)x)?(\d+)', topology)
  if found is None:
    raise ConfigError(f'topology is {topology!r}; expected a TPU slice as in v5e:16x16, GPUs as in '
                      f'h200:8, nodes of them as in h200:4x8; of {", ".join(GPUS)}')  # fmt: skip
  if not any(importlib.util.find_spec(f'jax_cuda{n}_plugin') for n in (12, 13)):
    raise ConfigError(f'topology is {topology!r}, which needs pip install rla-jax[cuda]')
  name, nodes, count = found.groups()
  return topologies.get_topology_desc(
    platform='cuda', topology=f'{nodes or 1}x1x{count}', target_config=_text(GPUS[name])
  ).devices


def _text(gpu: Gpu) -> str:
  """A GpuTargetConfigProto; what no field says is the same for all of them."""
  peak = PEAKS[gpu.kind]
  return f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {gpu.capability} }}
      core_count: {gpu.cores}
      shared_memory_per_core: {gpu.shared}
      shared_memory_per_block_optin: {gpu.shared - _KB}
      l2_cache_size: {gpu.cache}
      device_memory_size: {int(peak.memory)}
      memory_bandwidth: {int(peak.memory_rate)}
      clock_rate_ghz: {gpu.clock}
      fpus_per_core: {64 if gpu.capability == 8 else 128}
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
