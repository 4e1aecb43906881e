"""Compiles the training step of a config for devices that need not be there.

  python experiments/compile.py --config=configs/rdn_1p5b.py --topology=v5e:16x16
  python experiments/compile.py --config=configs/rdn_1p5b.py --topology=v5p:4x4x4 \\
      --config.mesh.fsdp=16 --config.mesh.tensor=4 --config.accumulate=2
  python experiments/compile.py --config=configs/rdn_350m.py --topology=h200:8
  python experiments/compile.py --config=configs/quickstart.py --topology=attached

Prints memory, products, communication and a lower bound of the time of a step, each on one device.
A layout that does not fit ends with exit status 1, and with the nearest one that does. No TPU is
needed, only `pip install -e '.[train,tpu]'`, and no GPU, only '.[train,cuda]'; nothing is run.

Several layouts for several slices, and a CSV of them; layouts that do not fit are rows as well:

  python experiments/compile.py --config=configs/rdn_1p5b.py --csv=layouts.csv \\
      --topology=v5e:16x16,v5p:4x4x4,v6e:16x16 --layout=fsdp=-1 --layout=data=4,fsdp=-1
"""

import datetime
import importlib.metadata
import itertools
import os
import pathlib

from absl import flags

from rla_jax.evaluation.results import read_rows, write_rows
from rla_jax.training.command_line import define_config, overrides, run, sizes_of

_CONFIG = define_config()
_TOPOLOGY = flags.DEFINE_list(
  'topology', None, 'TPU slices such as v5e:16x16, v5p:4x4x4, v6e:16x16; GPUs of one node such as '
  'h200:8; or attached: the TPUs or GPUs of this process.', required=True,
)  # fmt: skip
_VOCABULARY = flags.DEFINE_integer(
  'vocab_size', 32_000, 'Size of the vocabulary, unless the config says it.'
)
_LAYOUTS = flags.DEFINE_multi_string(
  'layout', [], 'Instead of config.mesh: sizes by axis such as fsdp=-1,tensor=2; all others are 1. '
  'May be repeated.',
)  # fmt: skip
_CSV = flags.DEFINE_string('csv', None, 'A file that gets a row for each layout on each slice.')


def main(_):
  """Compiles as the flags say."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # Or libtpu asks a cloud for its metadata.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # No chip is opened, so none is locked.
  import jax

  from rla_jax.training import ahead_of_time, fit
  from rla_jax.training.config import check
  from rla_jax.training.train import make_mesh

  config = _CONFIG.value
  check(config)
  if config.model.vocab_size is None:
    config.model.vocab_size = _VOCABULARY.value
  layouts = [sizes_of(text) for text in _LAYOUTS.value] or [dict(config.mesh)]
  missing = 0
  for topology, sizes in itertools.product(_TOPOLOGY.value, layouts):
    if topology == 'attached':
      devices = jax.devices()
    else:
      jax.config.update('jax_platforms', 'cpu')
      devices = ahead_of_time.described_devices(topology)
    config.mesh.update(sizes)
    found = fit.measure(config, make_mesh(config, devices))
    print(f'{topology}: {len(devices)} x {devices[0].device_kind}\n{found}', flush=True)
    if _CSV.value is not None:
      write(pathlib.Path(_CSV.value), topology, found.row)
    elif not found.fits:
      missing += 1
      other = fit.nearest(config, devices, found)
      print('\nIt does not fit. The nearest layout that does:' if other else
            '\nIt does not fit, and no layout near it does.')  # fmt: skip
      print(other or '')
  return 1 if missing else 0


def write(path: pathlib.Path, topology: str, row: dict[str, object]) -> None:
  """Puts a row into the file, in the place of one of the same config, overrides and layout."""
  compiler = 'libtpu' if topology.startswith('v') else 'jaxlib'
  versions = ' '.join(f'{name} {importlib.metadata.version(name)}' for name in ('jax', compiler))
  row = {
    'config': flags.FLAGS['config'].config_filename, 'overrides': overrides(), 'topology': topology
  } | {
    name: f'{value:.4g}' if isinstance(value, float) else value for name, value in row.items()
  } | {'date': datetime.date.today().isoformat(), 'versions': versions}  # fmt: skip
  rows = read_rows(path) if path.exists() else []
  key = ('config', 'overrides', 'topology', 'data', 'fsdp', 'seq', 'tensor', 'accumulate')
  rows = [other for other in rows if any(other[name] != row[name] for name in key)] + [row]
  path.parent.mkdir(parents=True, exist_ok=True)
  write_rows(path, rows)


if __name__ == '__main__':
  run(main)
