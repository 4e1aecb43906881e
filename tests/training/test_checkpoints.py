"""A damaged checkpoint is noticed, named and passed over; a foreign one is refused."""

import contextlib
import gc
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.sharding import make_mesh
from rla_jax.training import CheckpointError
from rla_jax.training.checkpoints import Checkpoints
from rla_jax.training.state import TrainState

FINGERPRINT = {'digest': 'abc'}


def make_state(step):
  rng = np.random.default_rng(step)
  params = {
    'kernel': jnp.asarray(rng.normal(size=(64, 32)), jnp.float32),
    'scale': jnp.asarray(rng.normal(size=32), jnp.bfloat16),
  }
  return TrainState(jnp.int32(step), jnp.int32(0), params, {'mu': params})


def targets(state):
  def target(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

  return jax.tree.map(target, {'params': state.params, 'progress': state.progress})


def assert_is(restored, step):
  found_step, trees, fingerprint = restored
  assert found_step == step
  assert fingerprint == FINGERPRINT
  state = make_state(step)
  wanted = {'params': state.params, 'progress': state.progress}
  jax.tree.map(np.testing.assert_array_equal, trees, wanted)
  assert jax.tree.map(lambda x: x.dtype, trees) == jax.tree.map(lambda x: x.dtype, wanted)


@pytest.fixture
def lines():
  return []


@pytest.fixture
def saved(tmp_path, config, lines):
  """Steps 1, 2 and 3 are saved; gives a context that opens them anew."""
  config.keep_checkpoints = 3
  with Checkpoints(tmp_path, config) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), FINGERPRINT)

  @contextlib.contextmanager
  def opened():
    with Checkpoints(tmp_path, config, lines.append) as checkpoints:
      yield checkpoints

  return opened


def damage(folder, rng):
  """Flips one bit of one of the larger files of a step: where the arrays are."""
  files = sorted(p for p in folder.rglob('*') if p.is_file() and p.stat().st_size > 2000)
  file = rng.choice(files)
  content = bytearray(file.read_bytes())
  position = rng.randrange(len(content))
  content[position] ^= 1 << rng.randrange(8)
  file.write_bytes(bytes(content))


def truncate(folder):
  """Cuts every file that is large enough to hold arrays."""
  for file in folder.rglob('*'):
    if file.is_file() and file.stat().st_size > 1000 and file.parent.name != 'record':
      file.write_bytes(file.read_bytes()[:100])


def test_round_trip_takes_the_newest(saved):
  with saved() as checkpoints:
    assert_is(checkpoints.restore(**targets(make_state(0))), 3)


def test_a_part_can_be_restored_alone_onto_another_mesh(saved):
  mesh = make_mesh(data=4, fsdp=2)
  place = jax.NamedSharding(mesh, jax.P('fsdp'))
  wanted = make_state(3).params
  target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), wanted)
  with saved() as checkpoints:
    _, trees, _ = checkpoints.restore(params=target)
  assert set(trees) == {'params'}
  assert trees['params']['kernel'].sharding == place
  jax.tree.map(np.testing.assert_array_equal, trees['params'], wanted)


def test_flipped_bits_are_never_restored(saved, tmp_path):
  newest = tmp_path / 'checkpoints' / '00000003'
  shutil.copytree(newest, tmp_path / 'whole')
  found = []
  for seed in range(12):
    shutil.rmtree(newest, ignore_errors=True)
    shutil.copytree(tmp_path / 'whole', newest)
    damage(newest, random.Random(seed))
    with saved() as checkpoints:
      restored = checkpoints.restore(**targets(make_state(0)))
    assert_is(restored, restored[0])  # Right to the last bit, whichever step it is.
    found.append(restored[0])
  # A file may hold bytes that nothing refers to; most flips must have been noticed nevertheless.
  assert found.count(2) >= 6
  assert set(found) <= {2, 3}


def test_damaged_steps_are_set_aside_and_can_be_saved_again(saved, tmp_path, lines):
  truncate(tmp_path / 'checkpoints' / '00000003')
  with saved() as checkpoints:
    assert_is(checkpoints.restore(**targets(make_state(0))), 2)
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(3, make_state(3), FINGERPRINT)
  assert [p.name for p in (tmp_path / 'damaged').iterdir()] == ['00000003.0']
  assert 'checkpoint 3 is damaged' in lines[0]
  with saved() as checkpoints:
    assert_is(checkpoints.restore(**targets(make_state(0))), 3)


def test_damage_is_one_short_line_and_nothing_else(tmp_path, config, lines, capfd):
  """Many arrays cannot be read; no read is left behind to complain when it is collected."""
  kernels = np.random.default_rng(0).normal(size=(40, 64, 64))
  params = {f'kernel_{i}': jnp.asarray(x, jnp.float32) for i, x in enumerate(kernels)}
  with Checkpoints(tmp_path, config) as checkpoints:
    for step in (1, 2):
      state = TrainState(jnp.int32(step), jnp.int32(0), params, {})
      checkpoints.save(step, state, FINGERPRINT)
  folder = tmp_path / 'checkpoints' / '00000002' / 'params'
  for file in folder.glob('*/d/*'):
    file.write_bytes(file.read_bytes()[:100])
  capfd.readouterr()
  with Checkpoints(tmp_path, config, lines.append) as checkpoints:
    step, _, _ = checkpoints.restore(**targets(state))
  gc.collect()
  assert step == 1
  (line,) = lines
  assert '\n' not in line and len(line) < 250
  assert line.startswith('checkpoint 2 is damaged, trying an older one: ')
  assert capfd.readouterr().err == ''


def test_the_damaged_array_is_named(saved, tmp_path, lines, monkeypatch):
  from rla_jax.training import checkpoints as module

  def flipped(tree):
    """As if TensorStore had read one wrong bit, and had not noticed."""
    found = original(tree)
    if 'kernel' in found and found['kernel'] == original(make_state(3).params)['kernel']:
      found['kernel'][2] ^= 1
    return found

  original = module.describe
  monkeypatch.setattr(module, 'describe', flipped)
  with saved() as checkpoints:
    assert_is(checkpoints.restore(**targets(make_state(0))), 2)
  assert 'the checksum of params/kernel does not verify' in lines[0]


@pytest.mark.parametrize('how', ['truncated', 'empty', 'record'])
def test_incomplete_steps_are_passed_over(saved, tmp_path, how):
  folder = tmp_path / 'checkpoints' / '00000003'
  if how == 'truncated':
    truncate(folder)
  elif how == 'empty':
    shutil.rmtree(folder)
    folder.mkdir()
  else:
    record = folder / 'record' / 'metadata'
    record.write_text(record.read_text().replace('"abc"', '"abd"'))
  with saved() as checkpoints:
    assert_is(checkpoints.restore(**targets(make_state(0))), 2)


def test_nothing_is_touched_if_no_step_verifies(saved, tmp_path):
  for step in (1, 2, 3):
    shutil.rmtree(tmp_path / 'checkpoints' / f'{step:08d}' / 'params')
  with saved() as checkpoints:
    with pytest.raises(CheckpointError, match=r'no checkpoint .* verifies \(tried steps \[3, 2, 1'):
      checkpoints.restore(**targets(make_state(0)))
    assert checkpoints.steps() == [1, 2, 3]
  assert not (tmp_path / 'damaged').exists()


@pytest.mark.parametrize('change', ['dtype', 'shape', 'missing'])
def test_other_arrays_are_refused_not_cast(saved, change):
  wanted = targets(make_state(0))
  if change == 'missing':
    del wanted['params']['scale']
  else:
    kernel = wanted['params']['kernel']
    shape, dtype = ((64, 16), kernel.dtype) if change == 'shape' else (kernel.shape, jnp.float16)
    wanted['params']['kernel'] = jax.ShapeDtypeStruct(shape, dtype, sharding=kernel.sharding)
  with saved() as checkpoints, pytest.raises(CheckpointError, match='does not fit the model: '):
    checkpoints.restore(**wanted)


def test_none_without_checkpoints(tmp_path, config):
  with Checkpoints(tmp_path, config) as checkpoints:
    assert checkpoints.restore(**targets(make_state(0))) is None


def test_a_save_that_fails_is_an_error(saved, monkeypatch):
  with saved() as checkpoints:
    monkeypatch.setattr(checkpoints._manager, 'save', lambda *args, **kwargs: False)
    with pytest.raises(CheckpointError, match='step 4 was not saved: Orbax declined'):
      checkpoints.save(4, make_state(4), FINGERPRINT)
