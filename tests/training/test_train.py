"""Runs: what they leave, how they go on, how they end."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from rla_jax.data import DataError
from rla_jax.training import DivergedError, WorkdirError, train_and_evaluate
from rla_jax.training import train as train_module
from rla_jax.training.metrics import read
from tests.training.conftest import make_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMED = {
  'train/tokens_per_second', 'train/mfu', 'train/productive_seconds', 'train/goodput'
}  # fmt: skip


def assert_same_state(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def records(workdir):
  """The metrics without what depends on the clock."""
  return [{k: v for k, v in r.items() if k not in TIMED} for r in read(workdir / 'metrics.jsonl')]


@pytest.fixture
def interrupted_at(monkeypatch):
  """Gives a function that makes the next run get a signal once a step has been dispatched."""

  def arrange(step, number=signal.SIGTERM):
    class Interrupting(train_module.Report):
      def step(self, step_number, result):
        super().step(step_number, result)
        if step_number == step:
          os.kill(os.getpid(), number)

    monkeypatch.setattr(train_module, 'Report', Interrupting)
    return monkeypatch.undo

  return arrange


@pytest.fixture(scope='module')
def finished(text_dir, tmp_path_factory):
  """An uninterrupted run and its working directory."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  return train_and_evaluate(make_config(text_dir), workdir), workdir


@pytest.fixture
def whole(finished, tmp_path):
  """The outcome of the uninterrupted run; tmp_path / 'whole' is a copy of its working directory."""
  outcome, workdir = finished
  shutil.copytree(workdir, tmp_path / 'whole')
  return outcome


def test_a_run_learns_and_leaves_everything(whole, config, tmp_path, capsys):
  root = tmp_path / 'whole'
  assert whole.step == config.steps
  assert whole.stopped_by is None
  found = records(root)
  assert [r['step'] for r in found] == list(range(1, config.steps + 1))
  assert found[-1]['train/loss'] < found[0]['train/loss'] - 0.1
  assert [r['step'] for r in found if 'eval/loss' in r] == [4, 6]
  assert found[-1]['eval/loss'] == whole.evaluation.loss
  evaluation = whole.evaluation
  assert evaluation.bits_per_byte == pytest.approx(
    evaluation.loss / np.log(2) * evaluation.tokens / evaluation.bytes
  )
  assert 'bits per byte' in str(evaluation)
  # Ids of a synthetic task stand for no text.
  assert 'byte' not in str(dataclasses.replace(evaluation, bytes=0))
  assert sorted(p.name for p in (root / 'checkpoints').iterdir()) == ['00000003', '00000006']
  (start,) = [json.loads(line) for line in (root / 'starts.jsonl').read_text().splitlines()]
  assert start['step'] == 0
  assert start['versions']['jax'] == jax.__version__


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_restart_is_bitwise_the_same(
  whole, config, tmp_path, interrupted_at, number
):
  undo = interrupted_at(2, number)
  first = train_and_evaluate(config, tmp_path / 'parts')
  assert (first.step, first.stopped_by) == (2, signal.Signals(number).name)
  undo()
  second = train_and_evaluate(config, tmp_path / 'parts')
  assert_same_state(second.state, whole.state)
  assert second.evaluation == whole.evaluation
  assert records(tmp_path / 'parts') == records(tmp_path / 'whole')


def test_a_finished_run_is_evaluated_again_and_changes_nothing(
  whole, config, tmp_path, monkeypatch
):
  monkeypatch.delattr(train_module, 'compile_step')  # there is no step for it
  again = train_and_evaluate(config, tmp_path / 'whole')
  assert again.evaluation == whole.evaluation
  assert_same_state(again.state, whole.state)
  assert len(records(tmp_path / 'whole')) == config.steps


def test_evaluation_that_a_signal_broke_off_is_made_up_for(
  whole, config, tmp_path, monkeypatch
):
  original = train_module.evaluate

  def signalled(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)

  monkeypatch.setattr(train_module, 'evaluate', signalled)
  first = train_and_evaluate(config, tmp_path / 'parts')
  assert (first.step, first.stopped_by) == (4, 'SIGTERM')
  assert 'eval/loss' not in records(tmp_path / 'parts')[-1]
  monkeypatch.undo()
  train_and_evaluate(config, tmp_path / 'parts')
  assert records(tmp_path / 'parts') == records(tmp_path / 'whole')


@pytest.mark.parametrize('phase', ['create_state', 'compile_step'])
def test_a_signal_before_the_first_step_leaves_nothing_that_misleads(
  whole, config, tmp_path, monkeypatch, phase
):
  original = getattr(train_module, phase)

  def signalled(*args):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)

  monkeypatch.setattr(train_module, phase, signalled)
  first = train_and_evaluate(config, tmp_path / 'parts')
  assert (first.step, first.stopped_by) == (0, 'SIGTERM')
  monkeypatch.undo()
  second = train_and_evaluate(config, tmp_path / 'parts')
  assert_same_state(second.state, whole.state)
  assert records(tmp_path / 'parts') == records(tmp_path / 'whole')


def test_kill_9_loses_at_most_an_interval(whole, config, tmp_path):
  workdir = tmp_path / 'killed'
  code = """
import sys, time, json
from rla_jax.training import train as module
from rla_jax.training.config import get_config
from rla_jax.training.workdir import read_config
wait = module.Report.step
def slow(self, number, result):
  wait(self, number, result)
  if number == 5:
    print('at 5', flush=True)
    time.sleep(60)
module.Report.step = slow
module.train_and_evaluate(read_config(sys.argv[1]), sys.argv[2])
"""
  process = subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path / 'whole'), str(workdir)],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir},
  )  # fmt: skip
  with process:
    assert process.stdout.readline() == 'at 5\n'
    deadline = time.monotonic() + 60
    while not (workdir / 'checkpoints' / '00000003').exists() and time.monotonic() < deadline:
      time.sleep(0.1)
    process.kill()
  assert process.returncode == -signal.SIGKILL
  again = train_and_evaluate(config, workdir)
  starts = (workdir / 'starts.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in starts] == [0, 3]
  assert_same_state(again.state, whole.state)
  assert records(workdir) == records(tmp_path / 'whole')


def test_the_step_compiles_exactly_once_and_works_in_the_state_s_place(
  config, tmp_path, monkeypatch
):
  compiled, programs = [], []
  original = train_module.compile_step
  monkeypatch.setattr(
    train_module, 'compile_step', lambda *args: programs.append(original(*args)) or programs[-1]
  )

  def listen(event, seconds, **kwargs):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(kwargs.get('fun_name', ''))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    state = train_and_evaluate(config, tmp_path / 'run').state
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert sum('train_step' in name for name in compiled) == 1, compiled
  assert sum('loss_sums' in name for name in compiled) == 1, compiled
  (program,) = programs
  # Every array of the state is on each of the eight devices.
  held = sum(x.nbytes for x in jax.tree.leaves(state))
  assert program.memory_analysis().alias_size_in_bytes == held


@pytest.mark.slow
def test_accumulation_gives_the_same_run(config, tmp_path):
  config.data.batch_size = 16
  one = train_and_evaluate(config, tmp_path / 'one')
  config.accumulate = 2
  two = train_and_evaluate(config, tmp_path / 'two')
  assert two.evaluation.loss == pytest.approx(one.evaluation.loss, rel=1e-5)


def test_divergence_stops_with_the_last_checkpoint_untouched(config, tmp_path):
  config.steps = 20
  config.checkpoint_every = 1
  config.max_bad_steps = 2
  config.optimizer.learning_rate = 1e38
  with pytest.raises(DivergedError, match='not finite for 3 steps in a row, up to step'):
    train_and_evaluate(config, tmp_path / 'run')
  last = read(tmp_path / 'run' / 'metrics.jsonl')[-1]
  assert last['train/bad_steps'] == 2
  assert last['train/grad_norm'] is None


def test_another_config_changes_nothing(whole, config, tmp_path):
  root = tmp_path / 'whole'
  before = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
  config.seed = 1
  with pytest.raises(WorkdirError, match='seed: 0 there, 1 now'):
    train_and_evaluate(config, root)
  assert {p: p.stat().st_mtime_ns for p in root.rglob('*')} == before


def test_other_text_behind_the_same_path_is_refused(whole, config, tmp_path, text_dir):
  added = text_dir / 'added.txt'
  added.write_text('theta iota kappa ' * 20)
  try:
    with pytest.raises(DataError, match='not those of the checkpoint'):
      train_and_evaluate(config, tmp_path / 'whole')
  finally:
    added.unlink()


def test_missing_or_empty_text_leaves_no_config_behind(config, tmp_path):
  config.data.path = str(tmp_path / 'nothing.txt')
  with pytest.raises(DataError, match=r'nothing.txt.* does not exist'):
    train_and_evaluate(config, tmp_path / 'run')
  (tmp_path / 'nothing.txt').write_text('')
  with pytest.raises(DataError):
    train_and_evaluate(config, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_nothing_is_written_outside_the_workdir(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  train_and_evaluate(config, 'run')
  assert [p.name for p in tmp_path.iterdir()] == ['run']
