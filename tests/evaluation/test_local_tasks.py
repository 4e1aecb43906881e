import json
import pathlib

import pytest

from rla_jax.data import DataError
from rla_jax.evaluation import local_tasks
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
      record = json.dumps(dict.fromkeys(task.columns, 'x'))
      (sets / f'{task.files[-1]}.jsonl').write_text(record + '\n')  # by any of its names
  written, skipped = local_tasks.write(tmp_path, sets)
  assert set(skipped) == {'fda', 'swde'}
  assert skipped['fda'].endswith('has no fda.jsonl (.xz, .gz)')
  assert set(written) == set(local_tasks.TASKS) - set(skipped)
  assert {path.stem for path in tmp_path.glob('*.yaml')} == set(written)
  for name in written:
    path = sets.resolve() / f'{local_tasks.TASKS[name].files[-1]}.jsonl'
    assert json.dumps(str(path)) in (tmp_path / f'{name}.yaml').read_text()


def test_the_sets_of_the_data_folder_have_their_columns(tmp_path, data_dir):
  _, skipped = local_tasks.write(tmp_path, data_dir)
  assert set(skipped) == {'fda', 'swde'}


def test_wrong_columns_are_one_line(tmp_path):
  (tmp_path / 'piqa.jsonl').write_text('{"goal": "x", "sol1": "a"}\n')
  with pytest.raises(DataError, match=r"piqa.jsonl:1 has no column 'sol2'; its columns: goal, sol"):
    local_tasks.write(tmp_path, tmp_path, ['piqa'])


def test_the_page_lists_the_names_and_columns_of_every_set():
  page = (pathlib.Path(__file__).parents[2] / 'docs' / 'evaluation.md').read_text()
  rows = [row.split('|') for row in page.splitlines() if row.startswith('| `')]
  for name, task in local_tasks.TASKS.items():
    (row,) = (r for r in rows if f'`{name}`' in r[1] and len(r) == 5 and r[3].count('`') > 2)
    assert all(f'`{column}`' in row[3] for column in task.columns), name
    assert all(f'`{file}`' in row[2] or file == name for file in task.files), name
