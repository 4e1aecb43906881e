"""What is injected into runs, and how they end: with their result, or with one clear line."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from rla_jax import data
from rla_jax.data import DataError
from rla_jax.training import CheckpointError, TrainingError, train_and_evaluate
from rla_jax.training.checkpoints import Checkpoints
from rla_jax.training.config import check
from rla_jax.training.progress import Progress
from rla_jax.training.watchdog import STUCK, Watchdog
from tests.training import processes
from tests.training.test_checkpoints import make_state
from tests.training.test_train import records

# Where one array cannot be read, Orbax drops what reads the others unfinished.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def test_a_full_disk_is_one_line(config, tmp_path, monkeypatch, compiled_anew):
  """Files may not grow beyond 8 kB, as on a full disk: parameters take more, metrics less."""
  config.eval_every = config.log_every = 100
  monkeypatch.setattr(Progress, 'say', lambda self, text: None)  # pytest's capture is a file too.
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
  try:
    with pytest.raises(CheckpointError, match=r'checkpoint.* not saved') as error:
      train_and_evaluate(config, tmp_path / 'run')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert len(str(error.value).splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line(config):
  with pytest.raises(TrainingError, match='cannot write to workdir /proc/run'):
    train_and_evaluate(config, '/proc/run')


def test_the_watchdog_bites_once_nothing_happens(monkeypatch, capfd):
  ended = threading.Event()
  monkeypatch.setattr(os, '_exit', lambda status: ended.set() or sys.exit(status))
  monkeypatch.setattr(threading, 'excepthook', lambda arguments: None)
  with Watchdog(0.4) as watchdog:
    assert not ended.wait(0.8)  # Its clock starts with the first beat.
    for _ in range(6):
      watchdog.beat('step 3')
      assert not ended.wait(0.1)
    assert ended.wait(5)
  errors = capfd.readouterr().err
  assert processes.last_line(errors) == (
    'error: nothing has happened for 0.4 s (watchdog_seconds) after step 3; '
    'the same command goes on from the newest checkpoint'
  )
  assert 'test_the_watchdog_bites' in errors  # The stack dump says where.


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_process(config, tmp_path):
  config.watchdog_seconds = 3.0
  hook = 'time.sleep(100 if number == 3 else 0)'  # Before the loop takes note of step 3.
  (process,) = processes.start(config, tmp_path / 'run', devices=1, hook=hook)
  ((status, output, errors),) = processes.end([process])
  assert 'step 3' in output
  assert status == STUCK
  assert processes.last_line(errors) == (
    'error: nothing has happened for 3 s (watchdog_seconds) after step 2; '
    'the same command goes on from the newest checkpoint'
  )
  assert 'train_and_evaluate' in errors


@pytest.mark.slow
def test_other_devices_go_on_where_others_stopped(config, tmp_path):
  """From eight parts of each array to two by two, on two copies."""
  config.log_every = 100
  config.mesh.update({'data': 1, 'fsdp': 8})
  config.steps, config.optimizer.warmup_steps = 2, 1
  state = train_and_evaluate(config, tmp_path / 'run').state
  config.mesh.update({'data': 2, 'fsdp': 2, 'tensor': 2})
  again = train_and_evaluate(config, tmp_path / 'run').state
  assert again.params['head'].sharding.shard_shape((16, 258)) == (8, 129)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(state))


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_and_fewer_devices(config, tmp_path):
  """Eight, four and one, to the end that one device comes to by itself."""
  ends = []
  for devices, sizes in ((8, {'fsdp': 8}), (4, {'data': 2, 'fsdp': 2}), (1, {}), (1, {})):
    config.mesh.update(dict.fromkeys(('data', 'fsdp', 'seq', 'tensor'), 1) | sizes)
    hook = 'number in (2, 4) and os.kill(os.getpid(), signal.SIGTERM)' if devices > 1 else 'pass'
    folder = tmp_path / ('whole' if len(ends) == 3 else 'run')
    started = processes.start(config, folder, devices=devices, hook=hook)
    ((status, output, errors),) = processes.end(started)
    assert status == 0, errors
    ends.append(output[output.index('ended') :].split()[1:3])
  assert ends == [['2', 'SIGTERM'], ['4', 'SIGTERM'], ['6', 'None'], ['6', 'None']]
  for got, want in zip(records(tmp_path / 'run'), records(tmp_path / 'whole'), strict=True):
    assert got == pytest.approx(want, rel=1e-4)


def test_periodic_and_best_checkpoints_stay(config, tmp_path):
  config.keep_checkpoints, config.keep_every, config.keep_best = 2, 4, True
  losses = [5.0, 4.0, 1.0, 3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9]
  with Checkpoints(tmp_path, config) as checkpoints:
    for step, loss in enumerate(losses, start=1):
      checkpoints.save(step, make_state(step), {}, loss)
    checkpoints.wait()
  with Checkpoints(tmp_path, config) as checkpoints:  # Orbax has to find the losses again.
    checkpoints.save(11, make_state(11), {}, 2.2)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4, 8, 10, 11]


@pytest.mark.slow
def test_200_flipped_bits_are_never_restored(config, tmp_path):
  """Anywhere in any file of the newest checkpoint."""
  config.keep_checkpoints = 3
  with Checkpoints(tmp_path, config) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(step), {'digest': 'abc'})
  newest = tmp_path / 'checkpoints' / '00000002'
  shutil.copytree(newest, tmp_path / 'whole')
  states = {step: make_state(step).items for step in (1, 2)}
  targets = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[2]
  )
  rng = random.Random(0)
  restored = {1: 0, 2: 0}
  for _ in range(200):
    shutil.rmtree(newest, ignore_errors=True)
    shutil.copytree(tmp_path / 'whole', newest)
    files = sorted(p for p in newest.rglob('*') if p.is_file() and p.stat().st_size)
    file = rng.choices(files, weights=[p.stat().st_size for p in files])[0]
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(content))
    with Checkpoints(tmp_path, config, lambda line: None) as checkpoints:
      step, trees, fingerprint = checkpoints.restore(**targets)
    restored[step] += 1
    assert fingerprint == {'digest': 'abc'}
    jax.tree.map(np.testing.assert_array_equal, trees, states[step])
  print(f'{restored[1]} of 200 noticed, {restored[2]} without effect on any array')
  assert restored[1] > 100


@pytest.mark.slow
def test_200_flipped_bits_of_the_text_are_noticed(config, tmp_path, text_dir):
  config.data.path = str(shutil.copytree(text_dir, tmp_path / 'text'))
  config.data.cache_dir = str(tmp_path / 'cache')
  config.steps, config.optimizer.warmup_steps = 1, 0
  train_and_evaluate(config, tmp_path / 'run')
  folders = tmp_path / 'text', tmp_path / 'cache'
  files = sorted(p for folder in folders for p in folder.rglob('*')
                 if p.suffix in ('.txt', '.bin', '.npz'))  # fmt: skip
  rng = random.Random(0)
  whole = train_and_evaluate(config, tmp_path / 'run').evaluation
  first = data.fingerprint(check(config), data.load(check(config)))
  noticed = 0
  for _ in range(200):
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    before = file.read_bytes()
    file.write_bytes(bytes(content))
    try:
      found = data.fingerprint(check(config), data.load(check(config)))
      data.check_fingerprint(first, found)
      assert file.suffix != '.txt'  # The cache is verified, and made again from the text.
    except DataError:
      assert file.suffix == '.txt'
      noticed += 1
    file.write_bytes(before)
  print(f'{noticed} of 200 changed the text and were refused; the others were mended')
  assert noticed
  assert train_and_evaluate(config, tmp_path / 'run').evaluation == whole


@pytest.mark.slow
def test_20_random_kills_end_where_an_undisturbed_run_does(config, tmp_path):
  config.steps, config.checkpoint_every, config.eval_every = 600, 10, 600
  config.log_every = 10
  rng = random.Random(0)
  reached, lost = 0, []
  for _ in range(20):
    hook = 'time.sleep(0.02)'
    (process,) = processes.start(config, tmp_path / 'run', devices=1, hook=hook)
    first = int(processes.wait_for(process, 'step').split()[1])
    last = first + rng.randrange(1, 25)
    processes.wait_for(process, f'step {last}\n')
    time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    starts = [json.loads(x)['step']
              for x in (tmp_path / 'run' / 'starts.jsonl').read_text().splitlines()]  # fmt: skip
    assert starts[-1] == first - 1 <= reached
    lost.append(reached - starts[-1])
    reached = max([last, *(int(x.split()[1]) for x in output.splitlines() if x)])
  assert max(lost) <= 2 * config.checkpoint_every  # One interval, and the save that was under way.
  assert reached > 2 * config.checkpoint_every  # Some kills came after a restart from a checkpoint.
  print(f'20 kills, up to step {reached}; steps lost at each: {lost}')
  ends = []
  for name in ('run', 'whole'):
    (process,) = processes.start(config, tmp_path / name, devices=1)
    ((status, output, errors),) = processes.end([process], timeout=300)
    assert status == 0, errors
    ends.append(output[output.index('ended') :])
  assert ends[0] == ends[1]
  assert records(tmp_path / 'run') == records(tmp_path / 'whole')
