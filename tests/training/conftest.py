"""A corpus and a config small enough to train in a second."""

import contextlib
import random

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from rla_jax.training import get_config


@pytest.fixture(scope='session')
def text_dir(tmp_path_factory):
  """Thirty short documents of words that follow each other in a learnable way."""
  folder = tmp_path_factory.mktemp('text')
  rng = random.Random(0)
  for number in range(30):
    words = [rng.choice(('alpha beta', 'gamma delta', 'epsilon zeta')) for _ in range(40)]
    (folder / f'{number:02d}.txt').write_text(' '.join(words))
  return folder


@pytest.fixture(scope='session')
def compile_folder(tmp_path_factory):
  """Compiled programs of this session."""
  return tmp_path_factory.mktemp('compiled')


@contextlib.contextmanager
def compile_cache(folder):
  """Compiled programs are read from a folder and written there; from and to nowhere if None."""
  names = 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'
  before = [getattr(jax.config, name) for name in names]

  def use(values):
    for name, value in zip(names, values):
      jax.config.update(name, value)
    compilation_cache.reset_cache()

  use([folder, 0.0])
  try:
    yield
  finally:
    use(before)


@pytest.fixture(scope='module', autouse=True)
def compiled_once(compile_folder):
  """Runs of one config share their programs: what is under test is the loop around them."""
  with compile_cache(str(compile_folder)):
    yield


@pytest.fixture
def compiled_anew():
  """Programs are neither read nor kept: a fault under test must not reach those of other tests."""
  with compile_cache(None):
    yield


@pytest.fixture
def config(text_dir):
  """A config of one's own; see `make_config`."""
  return make_config(text_dir)


def make_config(text_dir):
  """One attention layer of width 16: the loop is under test, not the operators."""
  c = get_config()
  c.steps = 6
  c.log_every = 1
  c.eval_every = 4
  c.checkpoint_every = 3
  c.model.pattern = ('attention',)
  c.model.num_layers = 1
  c.model.model_dim = 16
  c.model.ffn_dim = 16
  c.model.num_heads = 2
  c.model.head_dim = 8
  c.model.dtype = 'float32'
  c.model.remat = 'none'
  c.data.path = str(text_dir)
  c.data.validation_fraction = 0.2
  c.data.seq_len = 16
  c.data.batch_size = 8
  c.optimizer.learning_rate = 1e-2
  c.optimizer.warmup_steps = 2
  return c
