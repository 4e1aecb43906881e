"""One strict setting for every test: eight CPU devices, no silent broadcast, no warning."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEVICES = '--xla_force_host_platform_device_count'

# JAX reads these once, when it is imported. JAX_PLATFORMS=cuda or tpu runs the same tests there.
if DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {DEVICES}=8'.strip()
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
