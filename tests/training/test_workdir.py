"""A working directory has one config and one process; others change nothing in it."""

import json
import subprocess
import sys

import pytest

from rla_jax.training import WorkdirError
from rla_jax.training.workdir import claimed, read_config, write_config


@pytest.fixture
def workdir(tmp_path, config):
  with claimed(tmp_path / 'run', config) as root:
    write_config(root, config)
  return root


def contents(root):
  return {p: p.read_bytes() for p in root.rglob('*') if p.is_file()}


def test_the_same_config_goes_on(workdir, config):
  with claimed(workdir, config) as root:
    assert root == workdir


def test_another_config_is_refused_with_the_difference(workdir, config):
  before = contents(workdir)
  config.data.seq_len = 32
  config.optimizer.learning_rate = 5e-3
  with pytest.raises(WorkdirError) as error, claimed(workdir, config):
    pass
  assert 'data.seq_len: 16 there, 32 now' in str(error.value)
  assert 'optimizer.learning_rate: 0.01 there, 0.005 now' in str(error.value)
  assert len(str(error.value).splitlines()) == 3
  assert contents(workdir) == before


def test_keys_without_effect_on_the_parameters_may_change(workdir, config):
  config.log_every = 7
  config.mesh.data = 2
  with claimed(workdir, config):
    pass


def test_config_comes_back_as_it_was(workdir, config):
  assert read_config(workdir) == config


def test_layer_options_come_back(tmp_path, config):
  config.model.layer_options = {'attention': {'num_kv_heads': 1, 'rope_base': None}}
  tmp_path.joinpath('run').mkdir()
  write_config(tmp_path / 'run', config)
  assert read_config(tmp_path / 'run') == config


def test_one_process_at_a_time(workdir, config):
  code = """
import fcntl, sys
file = open(sys.argv[1], 'a')
fcntl.flock(file, fcntl.LOCK_EX)
print('locked', flush=True)
sys.stdin.read()
"""
  holder = subprocess.Popen(
    [sys.executable, '-c', code, str(workdir / '.lock')],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  with holder:
    assert holder.stdout.readline() == 'locked\n'
    with pytest.raises(WorkdirError, match='another process'), claimed(workdir, config):
      pass
    holder.stdin.close()
  with claimed(workdir, config):
    pass


def test_results_without_a_config_are_left_alone(tmp_path, config):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  with pytest.raises(WorkdirError, match=r'holds metrics\.jsonl but no config\.json'):
    claimed(tmp_path, config).__enter__()


def test_a_place_that_cannot_be_written(config, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(WorkdirError, match='cannot write to workdir'):
    claimed(tmp_path / 'file' / 'run', config).__enter__()


def test_no_workdir_of_a_run(tmp_path):
  with pytest.raises(WorkdirError, match='no workdir of a training run'):
    read_config(tmp_path)


@pytest.mark.parametrize('key', ['momentum', 'optimizer.momentum', 'scheduler.kind'])
def test_a_key_of_another_version(workdir, key):
  path = workdir / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {key: 1}))
  with pytest.raises(WorkdirError, match=f'has the key {key!r}, unknown to this version'):
    read_config(workdir)
