"""The sweep of associative recall: a member of an ensemble is the run of the training loop."""

import csv
import pathlib
import re
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
from rla_jax.training import ConfigError
from rla_jax.training.trained import load

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'experiments'))

from sweeps import recall_table as table  # noqa: E402
from sweeps import runs  # noqa: E402
from sweeps.ahead import Ahead  # noqa: E402
from sweeps.alone import train_alone  # noqa: E402
from sweeps.arrays import evaluation_arrays, training_arrays  # noqa: E402
from sweeps.curves import Curves, last  # noqa: E402
from sweeps.ensemble import Ensemble, Member  # noqa: E402

from rla_jax.evaluation.results import read_rows, write_rows  # noqa: E402

RATE = 0.01


@pytest.fixture
def config(monkeypatch):
  """Two epochs of three steps on sets of two lengths, one batch not full."""

  def sets(seed, reassigned, sizes):
    return [synthetic.multi_query_recall(seed, *size, vocab_size=32) for size in sizes]

  monkeypatch.setattr(tasks, 'based_train', lambda s, r: sets(s, r, [(8, 1, 11), (16, 3, 8)]))
  monkeypatch.setattr(tasks, 'based_test', lambda s, r: sets(s + 1, r, [(8, 2, 5), (16, 3, 3)]))
  monkeypatch.setitem(
    tasks.TASKS, 'mqar', tasks.Task(
      32, lambda c: tasks.based_train(c.seed, 0), lambda c: tasks.based_test(c.seed, 0),
      shuffled=False,
    ),
  )  # fmt: skip
  c = runpy.run_path(str(ROOT / 'configs' / 'mqar.py'))['get_config']('gdn,32')
  c.update_from_flattened_dict({
    'steps': 6, 'data.seq_len': 16, 'data.batch_size': 8, 'model.implementation': 'reference',
    'model.pattern': ('base_conv',), 'model.num_layers': 1,
    'mesh.data': 1, 'mesh.fsdp': -1,
    'eval_every': 6, 'checkpoint_every': 6, 'log_every': 1,
  })  # fmt: skip
  with c.unlocked():
    c.model.layer_options = {}
  return c


def test_a_member_is_the_run_of_its_config(config, tmp_path):
  ensemble = Ensemble(config, [Member(0.1, 0), Member(RATE, 3)], tmp_path / 'ensemble')
  ensemble.run(evaluate_every=1, report=lambda line: None)
  alone = train_alone(config, Member(RATE, 3), tmp_path / 'run')
  params = load(tmp_path / 'run', sharding.make_mesh()).params
  for path, want in jax.tree_util.tree_leaves_with_path(params):
    member = ensemble._state.params
    for key in path:
      member = member[key.key]
    np.testing.assert_allclose(member[1], want, rtol=2e-4, atol=2e-5, err_msg=str(path))
    assert np.abs(member[0] - np.asarray(want)).max() > 1e-3 or want.size < 3
  assert [row['epoch'] for row in ensemble.curve] == [1, 1, 2, 2]
  assert ensemble.curve[-1] == pytest.approx(alone, rel=1e-3)


def test_less_than_an_epoch_is_one_line(config, tmp_path):
  config.steps = 2
  with pytest.raises(ConfigError, match='steps is 2; expected at least an epoch, 3'):
    Ensemble(config, [Member(RATE, 0)], tmp_path)


@pytest.mark.slow
def test_an_ensemble_goes_on_where_it_was_left(config, tmp_path):
  members = [Member(RATE, 0), Member(RATE, 1)]
  whole = Ensemble(config, members, tmp_path / 'whole')
  whole.run(report=lambda line: None)
  first = Ensemble(config, members, tmp_path / 'parts')
  assert not first.run(report=lambda line: None, stop=lambda: True)
  assert first.epoch == 1
  second = Ensemble(config, members, tmp_path / 'parts')
  assert second.epoch == 1
  second.run(report=lambda line: None)
  jax.tree.map(np.testing.assert_array_equal, second._state, whole._state)
  with pytest.raises(ValueError, match='is of another config or of other members'):
    Ensemble(config, members[:1], tmp_path / 'parts')


@pytest.mark.slow
@pytest.mark.parametrize('together', [True, False])
def test_the_command_trains_once_and_writes_its_table(config, tmp_path, capsys, together):
  import mqar_sweep

  arguments = [
    'mqar_sweep', f'--workdir={tmp_path}', '--mixers=delta_net', '--widths=32', '--rates=0.1,0.01',
    '--more_seeds=1', f'--together={together}', '--set=steps=6', '--set=data.seq_len=16',
    '--set=data.batch_size=8', '--set=model.implementation=reference', '--set=mesh.data=1',
    '--set=mesh.fsdp=-1', '--evaluate_every=1',
  ]  # fmt: skip
  with flagsaver.flagsaver():
    flags.FLAGS(arguments)
    mqar_sweep.main(None)
    first = capsys.readouterr().out
    mqar_sweep.main(None)
  assert 'finished before' not in first and '| mqar | delta_net | 32 | 2,048 |' in first
  assert re.findall(r': finished in .*s, (.*)', first) == ['1 of 2', '2 of 2']
  again = capsys.readouterr().out
  assert re.findall(r': finished before, (.*)', again) == ['1 of 2', '2 of 2']
  curves = list(tmp_path.glob('delta_net_d32_*/curve.csv'))
  rates, more = sorted((last(read_rows(path)) for path in curves), key=len, reverse=True)
  assert [(r['epoch'], r['learning_rate'], r['seed']) for r in rates] == [(2, 0.1, 0), (2, 0.01, 0)]
  best = max(rates, key=lambda r: r['accuracy'])['learning_rate']
  assert [(r['epoch'], r['learning_rate'], r['seed']) for r in more] == [(2, best, 1)]
  assert not list(tmp_path.glob('*/state.npz'))


def test_known_curves_are_finished_and_stand_in_the_table(tmp_path):
  def row(mixer, rate, seed, epoch, accuracy, **more):
    return {
      'task': 'mqar', 'mixer': mixer, 'width': 64, 'state_bytes': 8192, 'epoch': epoch,
      'learning_rate': rate, 'seed': seed, 'loss': 1.0, 'accuracy': accuracy, 'L64 N4': accuracy,
      'date': '2026-01-02', 'device': '1 TPU', 'jax': '0.1', **more,
    }  # fmt: skip

  old = [
    row('gdn', rate, seed, epoch, rate, commit='0123abc')
    for rate, seed, epoch in ((0.1, 0, 16), (0.1, 0, 32), (0.2, 0, 32), (0.2, 1, 16), (0.3, 0, 32))
  ]
  curves = Curves(tmp_path, old, epochs=32)
  columns = {'task': 'mqar', 'mixer': 'gdn', 'width': 64, 'state_bytes': 8192}
  found = curves.of(tmp_path / 'x', columns, [Member(0.1, 0), Member(0.2, 0)])
  assert [(r['learning_rate'], r['epoch']) for r in found] == [(0.1, 16), (0.1, 32), (0.2, 32)]
  assert curves.of(tmp_path / 'x', columns, [Member(0.2, 0), Member(0.2, 1)]) is None, 'stopped'
  assert curves.of(tmp_path / 'x', {**columns, 'width': 128}, [Member(0.2, 0)]) is None
  (tmp_path / 'x').mkdir()
  write_rows(tmp_path / 'x' / 'curve.csv', [row('gdn', 0.3, 0, 32, 0.9)])  # trained again
  assert curves.of(tmp_path / 'x', columns, [Member(0.3, 0)])[0]['accuracy'] == 0.9
  text = table.write(tmp_path, curves.all())
  assert '| mqar | gdn | 64 | 8,192 | 0.900 |' in text
  assert 'jax 0.1, commit 0123abc: gdn 64 (seed 0).' in text
  assert 'jax 0.1, commit unknown: gdn 64 (seed 0).' in text
  rows = read_rows(tmp_path / 'curves.csv')
  assert len(rows) == 4 and Curves(tmp_path / 'y', rows, epochs=32).all()


def test_a_width_is_finished_before_the_next(monkeypatch, tmp_path):
  """Its further seeds too: so a sweep that is stopped has whole rows."""
  import mqar_sweep

  trained = []

  def trainer(self, run, later):
    trained.append((run.columns['mixer'], run.columns['width'], [m.seed for m in run.members]))
    run.folder.mkdir(parents=True)
    return [
      {'epoch': 32, 'learning_rate': m.learning_rate, 'seed': m.seed, 'accuracy': 0.5, 'L8 N1': 0.5}
      for m in run.members
    ], True

  monkeypatch.setattr(mqar_sweep.Together, '__call__', trainer)
  arguments = [
    'mqar_sweep', f'--workdir={tmp_path}', '--mixers=gdn,rdn', '--widths=32,64', '--rates=0.1',
    '--more_seeds=1', f'--results={tmp_path}/results',
  ]  # fmt: skip
  with flagsaver.flagsaver():
    flags.FLAGS(arguments)
    mqar_sweep.main(None)
    assert trained == [
      (mixer, width, [seed]) for width in (32, 64) for seed in (0, 1) for mixer in ('gdn', 'rdn')
    ]
    known = tmp_path / 'results' / 'curves.csv'
    flags.FLAGS([*arguments, f'--workdir={tmp_path}/new', f'--known={known}', '--more_seeds=1,2'])
    mqar_sweep.main(None)
    assert trained[8:] == [(mixer, w, [1, 2]) for w in (32, 64) for mixer in ('gdn', 'rdn')]
    flags.FLAGS([*arguments, f'--known={tmp_path}/no.csv'])
    with pytest.raises(ConfigError, match=r'no\.csv: no such file'):
      mqar_sweep.main(None)
    other = ROOT / 'experiments' / 'results' / 'speed.csv'
    flags.FLAGS([*arguments, f'--known={other}'])
    with pytest.raises(ConfigError, match=r'speed\.csv has no epoch; expected a curves\.csv'):
      mqar_sweep.main(None)


def test_a_run_names_the_commits_of_all_calls_that_trained_it(monkeypatch, tmp_path):
  member = Member(0.1, 0)
  plan = [lambda: runs.Run(tmp_path / 'run', None, (member,), {'mixer': 'gdn', 'width': 64})]

  def call(commit, epoch, finished):
    monkeypatch.setattr(runs, 'commit', lambda: commit)
    (tmp_path / 'run').mkdir(exist_ok=True)
    row = {'epoch': epoch, 'learning_rate': 0.1, 'seed': 0, 'accuracy': 0.5}
    runs.train(plan, Curves(tmp_path), lambda run, later: ([row], finished), lambda: False)

  call('0123abc', 4, False)
  call('4567890', 8, False)
  call('4567890', 16, True)
  (row,) = read_rows(tmp_path / 'run' / 'curve.csv')
  assert (row['commit'], row['epoch']) == ('0123abc 4567890', 16)
  assert not (tmp_path / 'run' / 'unfinished.csv').exists()


def test_known_curves_that_are_too_short_are_told(capsys, tmp_path):
  rows = [
    {'mixer': mixer, 'learning_rate': 0.1, 'seed': 0, 'epoch': epoch}
    for mixer, epoch in (('gdn', 16), ('gdn', 32), ('rdn', 16))
  ]
  found = Curves(tmp_path, rows, 32).all()
  assert {row['mixer'] for row in found} == {'gdn'}
  assert '1 of 2 known members did not come to epoch 32' in capsys.readouterr().out


def test_what_is_made_ahead_is_made_once_and_raises_where_it_is_taken():
  made = []

  def make(x):
    made.append(x)
    return 1 / x

  ahead = Ahead(make)
  for _ in range(2):
    ahead.begin('a', 4)
  assert (ahead.take('a', 4), ahead.take('b', 2), made) == (0.25, 0.5, [4, 2])
  ahead.begin('a', 0)
  with pytest.raises(ZeroDivisionError):
    ahead.take('a', 0)


def test_a_seed_is_not_one_of_more_seeds(tmp_path):
  import mqar_sweep

  with flagsaver.flagsaver():
    flags.FLAGS(['mqar_sweep', f'--workdir={tmp_path}', '--seeds=0,1', '--more_seeds=2,1'])
    with pytest.raises(ConfigError, match='--more_seeds has 1, which --seeds has too'):
      mqar_sweep.main(None)


def test_more_seeds_of_one_rate_do_not_change_the_choice():
  def row(rate, seed, accuracy):
    return {'learning_rate': rate, 'seed': seed, 'accuracy': accuracy}

  one_seed = [row(0.001, 0, 0.7), row(0.01, 0, 0.8)]
  assert table.best_rate(one_seed) == 0.01
  assert table.best_rate([*one_seed, row(0.01, 1, 0.1), row(0.01, 2, 0.1)]) == 0.01
  assert table.best_rate([*one_seed, row(0.001, 1, 0.7), row(0.01, 1, 0.5)]) == 0.001
  assert table.best_rate([*one_seed, row(0.1, 1, 0.9), row(0.1, 2, 0.5)]) == 0.01, 'none is common'


def test_a_set_to_learn_from_has_its_own_number_of_targets():
  sets = [synthetic.multi_query_recall(0, 16, pairs, 5, vocab_size=32) for pairs in (1, 3)]
  shapes = [batch['targets'].shape for batch in training_arrays(sets, batch_size=4)]
  assert shapes == [(2, 4, 1), (2, 4, 3)]
  tests = evaluation_arrays(sets, members=2)
  assert [tests[name][0]['targets'].shape for name in tests] == [(5, 3), (5, 3)]


def test_the_table_takes_the_best_rate_and_the_mean_over_seeds(tmp_path):
  rows = [
    {'task': 'mqar', 'mixer': 'gdn', 'width': 64, 'state_bytes': 16384, 'epoch': epoch,
     'learning_rate': rate, 'seed': seed, 'loss': 1.0, 'accuracy': accuracy,
     'L128 N8': 0.25, 'L64 N16': accuracy, 'date': '2026-01-02', 'device': '1 TPU', 'jax': '0.1'}
    for rate, accuracies in ((0.001, (0.5, 0.7)), (0.01, (0.9, 0.1)))
    for seed, accuracy in enumerate(accuracies)
    for epoch in (16, 32)
  ]  # fmt: skip
  (tmp_path / 'a').mkdir()
  write_rows(tmp_path / 'a' / 'curve.csv', rows)
  found = last(Curves(tmp_path).all())
  assert len(found) == 4 and {row['epoch'] for row in found} == {32}
  (record,) = table.best(found)
  assert (record['learning_rate'], record['seeds'], record['published']) == (0.001, 2, 0.890)
  assert record['accuracy'] == pytest.approx(0.6) and record['std'] == pytest.approx(0.02**0.5)
  line = '| mqar | gdn | 64 | 16,384 | 0.600 ± 0.141 | 0.890 | 0.001 | 2 | 32 |'
  assert line in table.table(found)
  assert 'epochs | L64 N16 | L128 N8 |' in table.table(found)
  assert 'Measured 2026-01-02, 1 TPU, jax 0.1, commit unknown: gdn 64 (' in table.table(found)
  (record,) = table.best([row | {'task': 'mqar_reassigned'} for row in found])
  assert record['published'] is None
  table.figure(tmp_path / 'results.png', found)
  assert (tmp_path / 'results.png').stat().st_size > 1000
  with (tmp_path / 'a' / 'curve.csv').open() as file:
    assert len(list(csv.DictReader(file))) == 8
