import csv
import dataclasses
import json

import pytest

from rla_jax.data import DataError
from rla_jax.evaluation import Settings, provenance, run_suites, suites
from rla_jax.evaluation.results import Result, markdown
from rla_jax.training import get_config
from rla_jax.training.trained import TrainedModel
from tests.evaluation import models

SETTINGS = {'chunk': models.CHUNK, 'batch_tokens': models.BATCH_TOKENS}


@pytest.fixture
def bigram_run(monkeypatch, tmp_path):
  """A "run" whose checkpoint is the bigram model."""
  model, params, _ = models.bigram()
  trained = TrainedModel(get_config(), model, params, models.TOKENIZER, step=7)
  monkeypatch.setattr(suites, 'load', lambda workdir, mesh: trained)
  return tmp_path


@pytest.fixture
def sets(tmp_path):
  folder = tmp_path / 'sets' / 'eval'
  folder.mkdir(parents=True)
  (folder / 'wikitext.jsonl').write_text('{"page": " = A = \\n one , two"}\n{"page": "three"}\n')
  (folder / 'lambada.jsonl').write_text('{"text": "a b c"}\n')
  (tmp_path / 'text.txt').write_text('Once upon a time')
  return str(tmp_path / 'sets')


def test_perplexity_suite_leaves_tables_and_figures(bigram_run, sets):
  settings = Settings(data_dir=sets, path=str(bigram_run / 'text.txt'), **SETTINGS)
  found, skipped = run_suites('w', ['perplexity'], bigram_run / 'out', settings)
  assert not skipped
  assert [(r.task, r.metric, r.samples) for r in found] == [
    *(('text', m, 1) for m in ('word_perplexity', 'token_perplexity', 'bits_per_byte', 'loss')),
    *(('wikitext', m, 2) for m in ('word_perplexity', 'token_perplexity', 'bits_per_byte', 'loss')),
    ('lambada', 'perplexity', 1), ('lambada', 'accuracy', 1),
  ]  # fmt: skip
  out = bigram_run / 'out'
  saved = json.loads((out / 'results.json').read_text())
  assert saved['step'] == 7
  assert [r['value'] for r in saved['results']] == [r.value for r in found]
  with (out / 'results.csv').open() as file:
    assert [float(row['value']) for row in csv.DictReader(file)] == [r.value for r in found]
  assert '| wikitext | word_perplexity |' in (out / 'results.md').read_text()
  assert (out / 'text_positions.png').stat().st_size > 1000
  assert (out / 'wikitext_positions.csv').read_text().startswith('first,last,tokens,loss\n0,0,2,')


def test_absent_sets_are_named_and_not_counted(bigram_run, sets):
  (bigram_run / 'sets' / 'eval' / 'lambada.jsonl').unlink()
  settings = Settings(data_dir=sets, **SETTINGS)
  found, skipped = run_suites('w', ['wikitext', 'lambada'], bigram_run / 'out', settings)
  assert {r.task for r in found} == {'wikitext'}
  assert skipped == {'lambada': f'{sets} has no lambada_openai.jsonl or lambada.jsonl (.xz, .gz)'}
  saved = json.loads((bigram_run / 'out' / 'results.json').read_text())
  assert saved['skipped'] == skipped


def test_damaged_sets_are_named_and_the_others_counted(bigram_run, sets):
  (bigram_run / 'sets' / 'eval' / 'wikitext.jsonl').write_text('{"text": "a"}\n')
  settings = Settings(data_dir=sets, **SETTINGS)
  found, skipped = run_suites('w', ['wikitext', 'lambada'], bigram_run / 'out', settings)
  assert {r.task for r in found} == {'lambada'}
  path = bigram_run / 'sets' / 'eval' / 'wikitext.jsonl'
  assert skipped == {'wikitext': f"{path}:1 has no column 'page'; its columns: text"}
  with pytest.raises(DataError, match=r"nothing to evaluate on: wikitext: .*no column 'page'"):
    run_suites('w', ['wikitext'], bigram_run / 'out', settings)


def test_the_harness_is_not_needed_for_the_other_suites(bigram_run, sets, monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  settings = Settings(data_dir=sets, **SETTINGS)
  found, skipped = run_suites('w', ['lambada', 'piqa'], bigram_run / 'out', settings)
  assert {r.task for r in found} == {'lambada'}
  assert skipped == {'commonsense': "lm_eval is not installed: pip install -e '.[eval]'"}


def test_relative_paths_of_a_run_are_explained(bigram_run, monkeypatch):
  config = get_config()
  config.data.path = 'my_text/*.txt'
  trained = dataclasses.replace(suites.load('w', None), config=config)
  monkeypatch.setattr(suites, 'load', lambda workdir, mesh: trained)
  monkeypatch.chdir(bigram_run)
  message = (
    r"glob 'my_text/\*.txt' matches no file \(working directory .*\); a run's relative paths are "
    'looked up from the working directory: evaluate it from where it was trained, or give --path'
  )
  with pytest.raises(DataError, match=message):
    run_suites('w', ['text'], bigram_run / 'out', Settings(**SETTINGS))


@pytest.mark.parametrize(
  ('names', 'settings', 'message'),
  [
    (['lambda'], {}, "unknown suite or task 'lambda'; suites: perplexity"),
    ([], {}, 'no suite is given'),
    (['lambada'], {}, 'there is nothing to evaluate on: lambada: no data_dir is given'),
    (['lambada'], {'data_dir': '/none'}, "data_dir '/none' is no folder"),
    (['text'], {'path': '/none.txt'}, "file '/none.txt' does not exist"),
    (['text'], {'stride': 4}, 'stride is 4; expected at most window, None'),
  ],
)
def test_wrong_input_is_one_line(bigram_run, names, settings, message):
  with pytest.raises(DataError, match=message) as error:
    run_suites('w', names, bigram_run / 'out', Settings(**settings, **SETTINGS))
  assert '\n' not in str(error.value)


def test_tables_stand_beside_published_rows_of_the_same_metric():
  found = [Result('perplexity', 'wikitext', 'word_perplexity', 20.0, 62)]
  table = markdown(found, {'step': 1})
  head, _, row = table.splitlines()[:3]
  assert head.count('|') == row.count('|') == 9
  assert '| RDN |' in head
  assert row.endswith('| 17.33 | 18.42 | 17.27 | 16.57 |')
  other = markdown([Result('perplexity', 'text', 'loss', 1.0, 1)], {})
  assert 'RDN' not in other


def test_not_finite_numbers_are_null_in_json(tmp_path):
  suites.results.write(tmp_path, [Result('s', 't', 'm', float('inf'), 1)], {})
  assert json.loads((tmp_path / 'results.json').read_text())['results'][0]['value'] is None


def test_files_without_their_history_say_the_commit_by_a_variable(monkeypatch):
  monkeypatch.setenv('RLA_JAX_COMMIT', '0123abc')
  assert provenance.commit.__wrapped__() == '0123abc'
  monkeypatch.delenv('RLA_JAX_COMMIT')
  assert provenance.commit.__wrapped__() != '0123abc'
