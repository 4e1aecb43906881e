"""Tokens a second, MFU and memory of the training step on 1, 2, 4, ... of the attached devices.

  python experiments/scaling.py --config=configs/rdn_350m.py --csv=scaling.csv \\
      --layout=data=-1 --layout=fsdp=-1
  python experiments/scaling.py --config=configs/rdn_350m.py --csv=scaling.csv \\
      --layout=seq=-1 --config.data.seq_len=524288

Efficiency is the tokens a second of n devices over n times those of one. Tokens are random. Each
measurement is written as it comes; the same command again makes those that are missing, as told by
commit, devices, layout, rows and every --config.KEY=VALUE. The last lines are the file as a table
in Markdown. To try it without GPUs:
XLA_FLAGS=--xla_force_host_platform_device_count=4 and a small config.
"""

import datetime
import importlib.metadata
import itertools
import pathlib
import subprocess

import jax
from absl import flags

from rla_jax.evaluation.results import read_rows, write_rows
from rla_jax.sharding import AXES
from rla_jax.training import ConfigError, scaling
from rla_jax.training.command_line import define_config, numbers, overrides, run, sizes_of
from rla_jax.training.config import check
from rla_jax.training.train import make_mesh

_CONFIG = define_config()
_CSV = flags.DEFINE_string('csv', None, 'A file that gets a row for each mesh.', required=True)
_LAYOUTS = flags.DEFINE_multi_string(
  'layout', ['data=-1', 'fsdp=-1'], 'Sizes by axis, -1 for what is left. May be repeated.'
)
_DEVICES = flags.DEFINE_list('devices', None, 'Numbers of devices; default: powers of two to all.')
_ROWS = flags.DEFINE_integer(
  'rows', None, 'Rows a device along data and fsdp; default: those of config.device_tokens.'
)
_STEPS = flags.DEFINE_integer('steps', 10, 'Steps of a round; three rounds are timed.')
_COMMIT = flags.DEFINE_string('commit', None, 'Commit to record; default: what git says.')
_VOCABULARY = flags.DEFINE_integer(
  'vocab_size', 32_768, 'Size of the vocabulary, unless the config says it.'
)


def main(_):
  """Measures as the flags say."""
  config, table = _CONFIG.value, pathlib.Path(_CSV.value)
  check(config)
  if config.model.vocab_size is None:
    config.model.vocab_size = _VOCABULARY.value
  rows = _ROWS.value or max(1, config.device_tokens // config.data.seq_len)
  table.parent.mkdir(parents=True, exist_ok=True)
  found = read_rows(table) if table.exists() else []
  commit = _COMMIT.value or _commit()
  for count, layout in itertools.product(_counts(), _LAYOUTS.value):
    config.mesh.update(sizes_of(layout))
    config.data.batch_size = rows * count  # What does not divide the mesh is told before it runs.
    mesh = make_mesh(config, jax.devices()[:count])
    here = {
      'config': flags.FLAGS['config'].config_filename, 'device': jax.devices()[0].device_kind,
      'length': config.data.seq_len, 'rows_a_place': rows, 'remat': config.model.remat,
      'overrides': overrides(), 'commit': commit, **mesh.shape,
    }  # fmt: skip
    row = _known(found, here)
    if row is None:
      row = here | _measured(config, mesh, rows, _known(found, here | dict.fromkeys(AXES, 1)))
      found.append(row)
      write_rows(table, found)
    print(_line(row), flush=True)
  print(f'\n{scaling.table(found)}')


def _counts() -> list[int]:
  """Numbers of devices, in order.

  Raises:
    ConfigError: more than there are, or no numbers.
  """
  most = jax.device_count()
  counts = [2**n for n in range(most.bit_length())]
  if _DEVICES.value is not None:
    counts = sorted(numbers(_DEVICES))
  if counts[-1] > most:
    raise ConfigError(f'--devices asks for {counts[-1]}; there are {most}')
  return counts


def _known(rows, part):
  return next((row for row in rows if part.items() <= row.items()), None)


def _measured(config, mesh, rows, alone) -> dict[str, object]:
  """What is measured, beside the row of one device if there is one."""
  speed = scaling.measure(config, mesh, rows, _STEPS.value)
  jax.clear_caches()
  rate = speed and speed.tokens_per_second
  one = rate if mesh.size == 1 else alone and alone['tokens_per_second']
  return {
    'rows': speed and speed.rows, 'accumulate': speed and speed.accumulate,
    'step_seconds': speed and speed.seconds, 'tokens_per_second': rate,
    'efficiency': rate / (mesh.size * one) if rate and one else None,
    'mfu': speed and speed.mfu, 'memory_gb': speed and speed.memory / 2**30,
    'triton': speed and speed.triton, 'date': datetime.date.today().isoformat(),
    'jax': importlib.metadata.version('jax'), 'triton_version': _version('triton'),
  }  # fmt: skip


def _commit() -> str:
  command = ['git', 'rev-parse', '--short', 'HEAD']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  return done.stdout.strip() or 'unknown'


def _version(package) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _line(row) -> str:
  mesh = ', '.join(f'{axis} {row[axis]}' for axis in AXES) + f', remat {row["remat"]}'
  if row['tokens_per_second'] is None:
    return f'{mesh}: does not fit'
  line = f'{mesh}: {row["tokens_per_second"]:,.0f} tokens/s, {row["memory_gb"]:.2f} GiB a device'
  for name in ('efficiency', 'mfu'):
    line += '' if row[name] is None else f', {name} {100 * row[name]:.1f} %'
  return line + (', Triton kernels' if row['triton'] else ', no Triton kernels')


if __name__ == '__main__':
  run(main)
