import json
import pathlib

import pytest

from rla_jax.data import DataError
from rla_jax.evaluation import lm_eval, local_tasks
from rla_jax.evaluation.continuations import continue_greedily, cut
from rla_jax.evaluation.scorer import Scorer
from tests.evaluation import models


def test_cut_stops_at_the_first_stop_string():
  assert cut('one\ntwo. three', ['.', '\n']) == 'one'
  assert cut('one', ['\n', '']) == 'one'


def test_continuations_of_a_bigram_model_by_hand():
  model, params, log_p = models.bigram()
  scorer = Scorer(model, params, chunk=models.CHUNK, batch_tokens=models.BATCH_TOKENS)
  prompts = ['ab', '', 'x' * 70]

  def by_hand(prompt):
    ids = [models.TOKENIZER.bos_id, *prompt.encode()]
    for _ in range(6):
      ids.append(int(log_p[ids[-1]].argmax()))
    made = ids[1 + len(prompt) :]
    eos = models.TOKENIZER.eos_id
    return models.TOKENIZER.decode(made[: made.index(eos)] if eos in made else made)

  want = [by_hand(prompt) for prompt in prompts]
  for batch_size in (1, 2):
    got = continue_greedily(
      scorer, models.TOKENIZER, prompts, [[]] * 3, 6, batch_size=batch_size
    )
    assert got == want
  first = want[0][1]
  (stopped,) = continue_greedily(scorer, models.TOKENIZER, prompts[:1], [[first]], 6, batch_size=1)
  assert stopped == cut(want[0], [first])


def test_contains():
  assert local_tasks.contains(' It was PARIS.', ['London', 'paris']) == 1
  assert local_tasks.contains('', ['a']) == 0
  assert local_tasks.contains('anything', ['']) == 0


def test_written_for_the_sets_that_are_there(tmp_path):
  sets = tmp_path / 'sets'
  sets.mkdir()
  for name, task in local_tasks.TASKS.items():
    if name not in ('fda', 'swde'):
      record = json.dumps(dict.fromkeys(task.columns, 'x') | dict.fromkeys(task.values, 1))
      (sets / f'{task.files[-1]}.jsonl').write_text(record + '\n')  # by any of its names
  written, absent, damaged = local_tasks.write(tmp_path, sets)
  assert set(absent) == {'fda', 'swde'}
  assert absent['fda'].endswith('has no fda.jsonl or based_fda.jsonl (.xz, .gz)')
  assert not damaged
  assert set(written) == set(local_tasks.TASKS) - set(absent)
  assert {path.stem for path in tmp_path.glob('*.yaml')} == set(written)
  for name in written:
    path = sets.resolve() / f'{local_tasks.TASKS[name].files[-1]}.jsonl'
    assert json.dumps(str(path)) in (tmp_path / f'{name}.yaml').read_text()


def test_the_sets_of_the_data_folder_have_their_columns(tmp_path, data_dir):
  _, absent, damaged = local_tasks.write(tmp_path, data_dir)
  assert set(absent) == {'fda', 'swde'}
  assert not damaged


def test_wrong_columns_are_one_line_and_others_are_written(tmp_path):
  (tmp_path / 'piqa.jsonl').write_text('{"goal": "x", "sol1": "a"}\n')
  (tmp_path / 'nq.jsonl').write_text('{"question": "x", "answer": ["a"]}\n')
  written, absent, damaged = local_tasks.write(tmp_path, tmp_path, ['piqa', 'nq'])
  assert (written, absent) == (['nq'], {})
  (reason,) = damaged.values()
  assert reason.endswith("piqa.jsonl:1 has no column 'sol2'; its columns: goal, sol1")
  assert not (tmp_path / 'piqa.yaml').exists()


@pytest.mark.parametrize('answer', ['"maybe"', '"1"', '2', '1.0', 'null', '[true]'])
def test_an_answer_to_boolq_that_is_none_is_refused(tmp_path, answer):
  lines = [f'{{"passage": "x", "question": "y", "answer": {x}}}\n' for x in ('true', '0', answer)]
  (tmp_path / 'boolq.jsonl').write_text(''.join(lines))
  written, _, damaged = local_tasks.write(tmp_path, tmp_path, ['boolq'])
  assert not written
  message = f'boolq.jsonl:3 has answer {answer}; expected one of false, true, 0, 1'
  assert damaged['boolq'].endswith(message)
  (tmp_path / 'boolq.jsonl').write_text(''.join(lines[:2]))
  assert local_tasks.write(tmp_path, tmp_path, ['boolq'])[0] == ['boolq']


def test_without_the_harness_its_extra_is_named(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(SystemExit, match=r"^error: lm_eval is not .*: pip install -e '.\[eval\]'$"):
    lm_eval.main(['--workdir', 'run', '--tasks', 'nq'])


@pytest.fixture
def two_sets(tmp_path):
  """A good set and a bad one."""
  (tmp_path / 'nq.jsonl').write_text('{"question": "x", "answer": ["a"]}\n')
  (tmp_path / 'squad.jsonl').write_text('{"title": "x"}\n')
  (tmp_path / 'tasks').mkdir()
  return tmp_path


@pytest.mark.parametrize('words', [['--tasks', 'nq'], ['-t', 'nq', 'drop'], ['--tasks=n?,drop']])
def test_sets_that_are_not_asked_for_are_not_read(two_sets, words, capsys):
  lm_eval.write_tasks(two_sets / 'tasks', two_sets, ['--limit', '3', *words, '--log_samples'])
  assert [path.stem for path in (two_sets / 'tasks').glob('*.yaml')] == ['nq']
  assert 'squad' not in capsys.readouterr().err


@pytest.mark.parametrize('words', [['--tasks', 'nq,squad'], ['-t', 'nq', 'squad', 'some_group']])
def test_a_bad_set_that_is_asked_for_is_an_error(two_sets, words):
  with pytest.raises(DataError, match=r"squad.jsonl:1 has no column 'context'"):
    lm_eval.write_tasks(two_sets / 'tasks', two_sets, words)


@pytest.mark.parametrize('words', [[], ['--tasks=some_group,nq'], ['--config', 'c.yaml']])
def test_a_bad_set_that_may_be_asked_for_is_named(two_sets, words, capsys):
  lm_eval.write_tasks(two_sets / 'tasks', two_sets, words)
  assert [path.stem for path in (two_sets / 'tasks').glob('*.yaml')] == ['nq']
  assert "no task squad: " in capsys.readouterr().err


def test_the_page_lists_the_names_and_columns_of_every_set():
  page = (pathlib.Path(__file__).parents[2] / 'docs' / 'evaluation.md').read_text()
  rows = [row.split('|') for row in page.splitlines() if row.startswith('| `')]
  for name, task in local_tasks.TASKS.items():
    (row,) = (r for r in rows if f'`{name}`' in r[1] and len(r) == 5 and r[3].count('`') > 2)
    assert all(f'`{column}`' in row[3] for column in task.columns), name
    assert all(f'`{file}`' in row[2] or file == name for file in task.files), name
