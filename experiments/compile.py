"""Compiles the training step of a config for devices that need not be there.

  python experiments/compile.py --config=configs/rdn_1p5b.py --topology=v5e:16x16
  python experiments/compile.py --config=configs/rdn_1p5b.py --topology=v5p:4x4x4 \
      --config.mesh.fsdp=16 --config.mesh.tensor=4 --config.accumulate=2
  python experiments/compile.py --config=configs/quickstart.py --topology=attached

Prints memory, products, communication and a lower bound of the time of a step, each on one device.
A layout that does not fit ends with exit status 1, and with the nearest one that does. TPU
topologies need no TPU, only the package of `pip install rla-jax[tpu]`; nothing is run.
"""

import os

from absl import flags

from rla_jax.training.command_line import define_config, run

_CONFIG = define_config()
_TOPOLOGY = flags.DEFINE_string(
  'topology', None, 'TPU slice such as v5e:16x16, v5p:4x4x4, v6e:16x16; or attached: the devices '
  'of this process.', required=True,
)  # fmt: skip
_VOCABULARY = flags.DEFINE_integer(
  'vocab_size', 32_000, 'Size of the vocabulary, unless the config says it.'
)


def main(_):
  """Compiles as the flags say."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # Or libtpu asks a cloud for its metadata.
  import jax

  from rla_jax.training import ahead_of_time, fit
  from rla_jax.training.config import check
  from rla_jax.training.train import make_mesh

  config = _CONFIG.value
  check(config)
  if config.model.vocab_size is None:
    config.model.vocab_size = _VOCABULARY.value
  if _TOPOLOGY.value == 'attached':
    devices = jax.devices()
  else:
    jax.config.update('jax_platforms', 'cpu')
    devices = ahead_of_time.described_devices(_TOPOLOGY.value)
  found = fit.measure(config, make_mesh(config, devices))
  print(f'{len(devices)} x {devices[0].device_kind}')
  print(found)
  if found.fits:
    return 0
  other = fit.nearest(config, devices, found)
  print('\nIt does not fit. The nearest layout that does:' if other else
        '\nIt does not fit, and no layout near it does.')  # fmt: skip
  print(other or '')
  return 1


if __name__ == '__main__':
  run(main)
