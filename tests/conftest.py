"""One strict setting for every test: eight CPU devices, no silent broadcast, no warning."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Programs here are compiled once and run once on little arrays: LLVM's optimisations cost more than
# they save. XLA's own passes all run.
FLAGS = {
  '--xla_force_host_platform_device_count': 8,
  '--xla_backend_optimization_level': 0,
}

# JAX reads these once, when it is imported. JAX_PLATFORMS=cuda or tpu runs the same tests there.
given = os.environ.get('XLA_FLAGS', '')
ours = [f'{name}={value}' for name, value in FLAGS.items() if name not in given]
os.environ['XLA_FLAGS'] = ' '.join([given, *ours]).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('MPLBACKEND', 'agg')
if str(ROOT) not in sys.path:
  sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_configure(config):
  config.addinivalue_line('filterwarnings', 'error')


@pytest.fixture(scope='session')
def data_dir() -> Path:
  """Folder of sample texts and evaluation sets; not part of the repository."""
  folder = Path(os.environ.get('RLA_DATA_DIR', ROOT.parent / 'shared' / 'data'))
  if not folder.is_dir():
    pytest.skip(f'no data at {folder}; set RLA_DATA_DIR to a folder that has it')
  return folder
