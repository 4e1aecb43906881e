"""The check of a resume that users run: what it notices, and that it passes."""

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import pytest

from rla_jax.training import ConfigError, TrainingError, resume, train_and_evaluate

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_differences_are_named(config, tmp_path):
  config.steps = 3
  config.optimizer.warmup_steps = 1
  train_and_evaluate(config, tmp_path / 'one')
  shutil.copytree(tmp_path / 'one', tmp_path / 'same')
  metrics = tmp_path / 'same' / 'metrics.jsonl'
  records = [json.loads(line) for line in metrics.read_text().splitlines()]
  records[1]['train/tokens_per_second'] = -1.0  # What the clock says may differ.
  metrics.write_text(''.join(json.dumps(record) + '\n' for record in records))
  assert resume.differences(tmp_path / 'one', tmp_path / 'same') == []
  config.optimizer.weight_decay = 0.2  # Not seen in the loss of the first step.
  train_and_evaluate(config, tmp_path / 'other')
  found = resume.differences(tmp_path / 'one', tmp_path / 'other')
  assert any(line.startswith('params/embedding: ') for line in found)
  assert any(line.startswith('step 3: train/loss ') for line in found)
  assert not any(line.startswith('step 1: ') for line in found)
  metrics.write_text(''.join(json.dumps(record) + '\n' for record in records[:-1]))
  assert resume.differences(tmp_path / 'one', tmp_path / 'same') == [
    'records of 3 and 2 steps, or not of the same'
  ]
  shutil.rmtree(tmp_path / 'same' / 'checkpoints')
  with pytest.raises(TrainingError, match=r'in .*same is of step None, expected 3'):
    resume.differences(tmp_path / 'one', tmp_path / 'same')


def test_a_run_that_fails_or_ends_before_its_kill_says_why(tmp_path):
  fails = [sys.executable, '-c', 'import sys; sys.exit("error: no")']
  with pytest.raises(TrainingError, match=r'ended too early:\nerror: no'):
    resume.train(fails, tmp_path)
  with pytest.raises(TrainingError, match='ended too early'):
    resume.train_and_kill([sys.executable, '-c', ''], tmp_path, 1, random.Random(0))


def test_a_run_too_short_to_be_killed_is_refused(config):
  config.steps, config.checkpoint_every = 9, 3
  with pytest.raises(ConfigError, match=r'steps is 9, expected more than .* = 9'):
    resume.check_kills(config, 1)
  config.steps = 10
  resume.check_kills(config, 1)


@pytest.mark.slow
def test_the_program_kills_resumes_and_compares(text_dir, tmp_path):
  done = subprocess.run(
    [
      sys.executable, 'experiments/check_resume.py', '--config=configs/quickstart.py',
      f'--workdir={tmp_path}', '--kills=2', '--config.steps', '16', '--config.checkpoint_every=2',
      '--config.optimizer.warmup_steps=2', f'--config.data.path={text_dir}',
      '--config.data.validation_fraction=0.2', '--config.data.seq_len=16',
      '--config.model.num_layers=1', '--config.model.model_dim=16', '--config.model.num_heads=1',
      '--config.model.head_dim=16',
    ],
    cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.count('killed at step') == 2
  assert 'the same bits' in done.stdout
  assert min(resume.starts(tmp_path / 'killed')[1:]) > 0
