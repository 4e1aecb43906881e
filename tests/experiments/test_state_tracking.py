"""The sweep of state tracking: an ensemble of a shuffled task, the command, its table."""

import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from rla_jax import sharding
from rla_jax.data import synthetic
from rla_jax.data.synthetic import tasks
from rla_jax.evaluation.results import read_rows
from rla_jax.training import ConfigError
from rla_jax.training.trained import load

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'experiments'))

from sweeps import tracking_table  # noqa: E402
from sweeps.alone import train_alone  # noqa: E402
from sweeps.ensemble import Ensemble, Member  # noqa: E402

SMALL = {
  'steps': 6, 'data.seq_len': 8, 'data.batch_size': 8, 'model.implementation': 'reference',
  'model.model_dim': 16, 'model.ffn_dim': 16, 'model.num_heads': 2, 'model.head_dim': 8,
  'model.num_layers': 1, 'optimizer.warmup_steps': 1, 'mesh.data': 1, 'mesh.fsdp': -1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
  """Three steps an epoch, the last one not full."""
  monkeypatch.setattr(tasks, 'STATE_TRACKING_TRAIN', 21)
  monkeypatch.setattr(tasks, 'STATE_TRACKING_TEST', 5)


def test_a_member_of_a_shuffled_task_is_the_run_of_its_config(tmp_path):
  get_config = runpy.run_path(str(ROOT / 'configs' / 'state_tracking.py'))['get_config']
  config = get_config('delta_net,parity,negative')
  config.update_from_flattened_dict({**SMALL, 'eval_every': 6, 'checkpoint_every': 6})
  config.update_from_flattened_dict({'log_every': 1, 'optimizer.learning_rate': 0.01})
  config.optimizer.eps = 1e-4  # or the first steps are signs, of gradients that are rounding too
  ensemble = Ensemble(config, [Member(0.02, 0), Member(0.01, 3)], tmp_path / 'ensemble')
  ensemble.run(report=lambda line: None)
  alone = train_alone(config, Member(0.01, 3), tmp_path / 'run')
  params = load(tmp_path / 'run', sharding.make_mesh()).params
  for path, want in jax.tree_util.tree_leaves_with_path(params):
    member = ensemble._state.params
    for key in path:
      member = member[key.key]
    np.testing.assert_allclose(member[1], want, rtol=1e-3, atol=2e-5, err_msg=str(path))
  assert ensemble.curve[-1] == pytest.approx(alone, rel=1e-3)


def test_several_sets_are_not_shuffled_into_each_other(monkeypatch, tmp_path):
  get_config = runpy.run_path(str(ROOT / 'configs' / 'state_tracking.py'))['get_config']
  config = get_config('delta_net,parity')
  config.update_from_flattened_dict(SMALL)
  two = [synthetic.parity(seed, 8, 9) for seed in (0, 1)]
  task = tasks.Task(2, lambda c: two, lambda c: two)
  monkeypatch.setitem(tasks.TASKS, 'parity', task)
  config.data.seed = 7  # other data than that of the other tests, which are kept
  with pytest.raises(ConfigError, match=r"data\.path is 'parity', whose sets are shuffled"):
    Ensemble(config, [Member(0.01, 0)], tmp_path)


@pytest.mark.slow
def test_the_command_trains_once_and_writes_its_table(tmp_path, capsys):
  import state_tracking_sweep

  arguments = [
    'state_tracking_sweep', f'--workdir={tmp_path}', '--mixers=delta_net', '--seeds=0,1',
    '--tasks=parity,permutations', '--ahead=2',
    *(f'--set={name}={value}' for name, value in SMALL.items()),
  ]  # fmt: skip
  with flagsaver.flagsaver():
    flags.FLAGS(arguments)
    state_tracking_sweep.main(None)
    first = capsys.readouterr().out
    state_tracking_sweep.main(None)
    again = capsys.readouterr().out
    flags.FLAGS([*arguments, f'--workdir={tmp_path}/new', f'--known={tmp_path}/curves.csv'])
    state_tracking_sweep.main(None)
    known = capsys.readouterr().out
    flags.FLAGS([*arguments, '--ranges=3'])
    with pytest.raises(ConfigError, match="--ranges has '3'; expected some of"):
      state_tracking_sweep.main(None)
  assert first.count(': finished in') == 4 and again.count(': finished before') == 4
  assert known.count(': finished before') == 4
  assert known[known.index('| task') :] == first[first.index('| task') :]
  assert '| parity | delta_net | (0, 1) | 0.001 | 2 | 2 |' in first
  rows = read_rows(tmp_path / 'results.csv')
  assert [(r['task'], r['beta'], r['seed'], r['epoch']) for r in rows] == [
    (task, beta, seed, 2)
    for task in ('parity', 'permutations') for beta in ('(0, 1)', '(0, 2)') for seed in (0, 1)
  ]  # fmt: skip
  assert {'L8', 'L16', 'L32', 'commit'} <= set(rows[0])
  assert (tmp_path / 'results.png').stat().st_size > 1000


def test_accuracy_is_scaled_by_the_most_frequent_state(tmp_path):
  for task, draw in (
    ('parity', synthetic.parity), ('modular_arithmetic', synthetic.modular_arithmetic),
    ('permutations', synthetic.permutations),
  ):  # fmt: skip
    targets = draw(0, 256, 1000).targets
    share = np.bincount(targets.ravel()).max() / targets.size
    assert share == pytest.approx(tracking_table.CHANCE[task], abs=0.005), task
  rows = [
    {'task': 'parity', 'mixer': 'gdn', 'beta': '(0, 2)', 'epoch': epoch, 'learning_rate': 0.001,
     'seed': seed, 'parity L8': accuracy, 'parity L16': 0.5, 'date': '2026-01-02',
     'device': '1 TPU', 'jax': '0.1', 'commit': '0123abc'}
    for seed, accuracy in ((0, 1.0), (1, 0.75)) for epoch in (1, 2)
  ]  # fmt: skip
  (tmp_path / 'results.md').write_text('old\n## Remarks\n\nKept.\n')
  text = tracking_table.write(tmp_path, rows)
  assert '| parity | gdn | (0, 2) | 0.001 | 2 | 2 | 0.750 (0.500 .. 1.000) | 0.000 (0.0' in text
  assert 'commit 0123abc: parity gdn (0, 2) (seeds 0, 1).' in text
  assert (tmp_path / 'results.md').read_text().endswith(').\n\n## Remarks\n\nKept.\n')
