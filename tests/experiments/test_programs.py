"""The programs as a user types them: help, errors in one line, and what they print."""

import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest

from rla_jax.data import DataError
from rla_jax.training import ConfigError, train_and_evaluate
from rla_jax.training.trained import continue_text, evaluate_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = ('train', 'generate', 'evaluate', 'plot', 'quickstart')
QUICKSTART = '--config=configs/quickstart.py'


def run(program, *args, **kwargs):
  """Runs a program of experiments/ on one CPU device."""
  environment = {**os.environ, 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  return subprocess.run(
    [sys.executable, str(ROOT / 'experiments' / f'{program}.py'), *map(str, args)],
    cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, **kwargs,
  )  # fmt: skip


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A working directory of a small run."""
  folder = tmp_path_factory.mktemp('runs')
  (folder / 'text').mkdir()
  for number in range(12):
    (folder / 'text' / f'{number}.txt').write_text(f'document {number}: ' + 'to be or not ' * 20)
  config = runpy.run_path(str(ROOT / 'configs' / 'quickstart.py'))['get_config']()
  config.update_from_flattened_dict({
    'steps': 4, 'log_every': 1, 'optimizer.warmup_steps': 1, 'model.pattern': ('attention',),
    'model.num_layers': 1, 'model.model_dim': 16, 'model.ffn_dim': 16, 'model.num_heads': 2,
    'model.head_dim': 8, 'data.path': str(folder / 'text'), 'data.validation_fraction': 0.3,
    'data.seq_len': 32,
  })  # fmt: skip
  outcome = train_and_evaluate(config, folder / 'run')
  return folder / 'run', outcome


@pytest.mark.parametrize('program', PROGRAMS)
def test_help(program):
  result = run(program, '--help')
  assert '--workdir' in result.stdout or '--runs' in result.stdout
  assert f'python experiments/{program}.py' in result.stdout
  assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    ([QUICKSTART], '--workdir is required'),
    ([QUICKSTART, '--config.data.seqlen=3'], "'data.seqlen'; did you mean 'data.seq_len'?"),
    ([QUICKSTART, '--config.seq_len=3'], "'seq_len'; did you mean 'data.seq_len'?"),
    ([QUICKSTART, '--config.steps=many'], "invalid literal for int() with base 10: 'many'"),
    (['--config=configs/quickstrat.py'], "config file 'configs/quickstrat.py' does not exist"),
    ([QUICKSTART, '--config.data.path=no.txt', '--workdir={tmp}'], "'no.txt' does not exist"),
    ([QUICKSTART, '--config.accumulate=3', '--workdir={tmp}'], 'accumulate is 3, which does not'),
  ],
)
def test_errors_are_one_line(args, message, tmp_path):
  result = run('train', *(arg.format(tmp=tmp_path / 'run') for arg in args))
  assert result.returncode != 0
  last = result.stderr.strip().splitlines()[-1]
  assert last.startswith('error: ')
  assert message in last
  assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('c.data.seqlen = 3', "wrong.py:4: unknown config key 'seqlen'; did you mean 'data.seq_len'?"),
    ("c.steps = 'many'", 'wrong.py:4: '),
  ],
)
def test_errors_in_a_config_file_name_the_line(tmp_path, line, message):
  (tmp_path / 'wrong.py').write_text(
    'from rla_jax.training import get_config as base\n'
    f'def get_config():\n  c = base()\n  {line}\n  return c\n'
  )
  result = run('train', f'--config={tmp_path}/wrong.py', f'--workdir={tmp_path}/run')
  assert message in result.stderr.strip().splitlines()[-1]
  assert 'Traceback' not in result.stderr


def test_evaluate_repeats_the_figure_of_training(trained):
  workdir, outcome = trained
  result = run('evaluate', f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  figures = json.loads(result.stdout.splitlines()[-1])
  assert figures['step'] == 4
  assert figures['loss'] == pytest.approx(outcome.evaluation.loss, rel=1e-5)
  assert figures['bits_per_byte'] == pytest.approx(outcome.evaluation.bits_per_byte, rel=1e-5)


def test_a_run_s_relative_path_is_looked_up_from_the_working_directory(
  trained, tmp_path, monkeypatch
):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  config = json.loads((workdir / 'config.json').read_text())
  (workdir / 'config.json').write_text(json.dumps(config | {'data.path': 'text'}))
  monkeypatch.chdir(tmp_path)
  message = "file 'text' does not exist .* evaluate it from where it was trained, or give --path"
  with pytest.raises(DataError, match=message):
    evaluate_run(workdir)
  monkeypatch.chdir(trained[0].parent)
  assert evaluate_run(workdir)[0] == 4


def test_generate_repeats_itself_with_the_same_seed(trained):
  workdir, _ = trained
  options = [f'--workdir={workdir}', '--prompt=to be', '--max_new_tokens=20', '--top_k=50']
  first, second = (run('generate', *options, '--seed=1') for _ in range(2))
  assert first.returncode == 0, first.stderr
  assert first.stdout.startswith('to be')
  assert len(first.stdout) > len('to be\n')
  assert first.stdout == second.stdout


def test_more_top_k_than_there_is_is_an_error_of_the_user(trained):
  with pytest.raises(ConfigError, match=r'top_k is 300; expected at most .* 258'):
    continue_text(trained[0], 'to be', 1, top_k=300)


def test_generate_without_a_run(tmp_path):
  result = run('generate', f'--workdir={tmp_path}')
  assert 'no workdir of a training run' in result.stderr.strip().splitlines()[-1]
  assert 'Traceback' not in result.stderr


@pytest.mark.parametrize(
  ('program', 'args', 'message'),
  [
    ('plot', ['--runs=run', '--output=loss.foo'], 'expected a file that ends in .png'),
    ('generate', ['--workdir=run', '--top_p=0'], 'expected a number above 0 and at most 1'),
    ('plot', ['--runs=no/run', '--output=loss.png'], 'no/run does not exist'),
    ('benchmark_cpu', ['--lengths=64,abc'], "--lengths has 'abc'; expected whole numbers"),
    ('benchmark_ops', ['--lengths=0'], "--lengths has '0'; expected whole numbers"),
    ('benchmark_ops', ['--suites=speed'], "the platform is 'cpu', no GPU"),
    ('support_table', ['--implementations=fast'], "--implementations has 'fast'; expected"),
    ('state_rounding', ['--length=65'], '--length is 65; expected a multiple of 32'),
    ('state_tracking_sweep', ['--workdir=run', '--tasks=foo'], "--tasks has 'foo'; expected"),
  ],
)
def test_a_wrong_value_of_a_flag_is_one_line(program, args, message):
  result = run(program, *args)
  assert result.returncode in (1, 2)
  (line,) = result.stderr.strip().splitlines()
  assert line.startswith('error: ') and message in line


def test_plot_draws(trained, tmp_path):
  workdir, _ = trained
  result = run('plot', f'--runs={workdir},{workdir}', f'--output={tmp_path}/loss.png')
  assert result.returncode == 0, result.stderr
  assert (tmp_path / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_plot_without_metrics(tmp_path):
  result = run('plot', f'--runs={tmp_path}', f'--output={tmp_path}/loss.png')
  assert 'has no metrics' in result.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_quickstart_prints_its_table(tmp_path):
  small = (ROOT / 'experiments' / 'quickstart.py').read_text()
  config = tmp_path / 'small.py'
  config.write_text(
    (ROOT / 'configs' / 'quickstart.py').read_text().replace('c.steps = ', 'c.steps = 60  # ')
    .replace('c.optimizer.warmup_steps = ', 'c.optimizer.warmup_steps = 10  # ')
  )  # fmt: skip
  program = tmp_path / 'quickstart.py'
  line = next(x for x in small.splitlines() if x.startswith('_CONFIG = '))
  program.write_text(small.replace(line, f'_CONFIG = {str(config)!r}'))
  result = subprocess.run(
    [sys.executable, str(program), f'--workdir={tmp_path}/run'],
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}, cwd=tmp_path,
    capture_output=True, text=True, timeout=1800,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  figures = {
    line.rsplit(None, 1)[0].strip(): line.split()
    for line in result.stdout.splitlines() if line.startswith('  ') and line.strip()
  }  # fmt: skip
  assert {'unigram', 'bigram', 'xz -9'} <= set(figures)
  assert (tmp_path / 'run' / 'loss.png').exists()
