"""The adapter in the harness itself; needs the extra `eval`."""

import itertools
import json
import math

import numpy as np
import pytest

from rla_jax import generation
from rla_jax.evaluation import SUITES, Settings, records, wikitext
from rla_jax.evaluation.likelihood import encode_pair
from rla_jax.evaluation.run import Run
from rla_jax.evaluation.scorer import Scorer
from rla_jax.training import get_config
from rla_jax.training.trained import TrainedModel
from tests.evaluation import models

pytest.importorskip('lm_eval', reason="lm_eval is not installed: pip install -e '.[eval]'")
pytestmark = pytest.mark.filterwarnings('ignore')  # of the harness and what it imports

# Of a choice among so many. Not of BoolQ: a model that sees the last token only says the same to
# every question, and its score is the share of the questions with that answer.
CHANCE = {
  'arc_easy': 1 / 4, 'arc_challenge': 1 / 4, 'piqa': 1 / 2, 'mmlu': 1 / 4, 'hellaswag': 1 / 4,
  'winogrande': 1 / 2, 'openbookqa': 1 / 4, 'social_iqa': 1 / 3, 'commonsense_qa': 1 / 5,
}  # fmt: skip

# One question of each set: what it is asked with, and its record for each answer that may be right.
_LABELLED = {'text': ['wet', 'dry', 'hot', 'cold', 'old'], 'label': list('ABCDE')}
_ASKED = {'question': 'What is water?', 'choices': _LABELLED}
QUESTIONS = {
  'arc_easy': (_ASKED, 'answerKey', list('ABCDE')),
  'arc_challenge': (_ASKED, 'answerKey', list('ABCDE')),
  'piqa': ({'goal': 'To dry', 'sol1': 'rub.', 'sol2': 'swim.'}, 'label', [0, 1]),
  'mmlu': ({'question': 'Is it?', 'subject': 'a_b', 'choices': list('wxyz')}, 'answer', range(4)),
  'hellaswag': ({'query': 'They run', 'choices': ['on', 'up', 'off', 'by']}, 'label', range(4)),
  'winogrande': ({'sentence': 'The _ ran.', 'option1': 'ox', 'option2': 'elk'}, 'answer', '12'),
  'boolq': ({'passage': 'Ice is cold.', 'question': 'is ice cold'}, 'answer', [False, True]),
  'openbookqa': ({'question_stem': 'It is', 'choices': _LABELLED}, 'answerKey', list('ABCDE')),
  'social_iqa': (
    {'context': 'Al ran.', 'question': 'Why?', 'answerA': 'fun', 'answerB': 'fear', 'answerC': 'x'},
    'label', '123',
  ),
  'commonsense_qa': (_ASKED, 'answerKey', list('ABCDE')),
}  # fmt: skip
ANSWERS = {'text': ['no such'], 'answer_start': [0]}
LOOKED_UP = {
  'drop': {'passage': 'a', 'question': 'b', 'answers': ['no such']},
  'squad': {'title': 'a', 'context': 'b', 'question': 'c', 'answers': ANSWERS},
  'nq': {'question': 'a', 'answer': ['no such']},
  'triviaqa': {'context': 'a', 'aliases': ['no such']},
  'fda': {'text': 'a', 'value': 'no such'},
  'swde': {'text': 'a', 'value': ''},
}

TRAINED = TrainedModel(get_config(), None, None, models.TOKENIZER, step=0)


class Request:
  """What the harness hands to a model."""

  def __init__(self, *args):
    self.args = args


def bigram_lm(**options):
  from rla_jax.evaluation.harness import RlaJaxLM

  model, params, log_p = models.bigram()
  scorer = Scorer(model, params, chunk=models.CHUNK, batch_tokens=models.BATCH_TOKENS)
  return RlaJaxLM(scorer=scorer, tokenizer=models.TOKENIZER, **options), log_p


def nats(log_p, text):
  ids = [models.TOKENIZER.bos_id, *text.encode()]
  return [-log_p[a, b] for a, b in itertools.pairwise(ids)]


def test_log_likelihoods_by_hand():
  lm, log_p = bigram_lm()
  pairs = [('the', ' cat'), ('', 'x y'), ('a ', 'b'), ('q' * 90, 'z'), ('abc', '')]
  found = lm.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
  for (context, continuation), (got, _) in zip(pairs[:-1], found[:-1], strict=True):
    _, ids = encode_pair(models.TOKENIZER, context, continuation)
    want = -sum(nats(log_p, context + continuation)[-len(ids) :])
    assert got == pytest.approx(want, rel=1e-6)
  assert found[-1] == (0.0, True)


def test_rolling_log_likelihoods_by_hand():
  lm, log_p = bigram_lm()
  texts = ['one two three', 'x' * 100]
  found = lm.loglikelihood_rolling([Request(text) for text in texts], disable_tqdm=True)
  assert found == pytest.approx([-sum(nats(log_p, text)) for text in texts], rel=1e-6)


def test_generation_stops_and_refuses_sampling():
  lm, _ = bigram_lm(batch_size=2)
  greedy = {'until': ['\n'], 'max_gen_toks': 6, 'do_sample': False}
  (text,) = lm.generate_until([Request('ab', greedy)], disable_tqdm=True)
  assert '\n' not in text
  with pytest.raises(ValueError, match='do_sample is True; expected greedy'):
    lm.generate_until([Request('ab', greedy | {'do_sample': True})])


def write_set(folder, name, found):
  (folder / f'{name}.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in found))


def test_one_answer_of_each_question_is_taken_for_right(tmp_path):
  """What a model prefers does not depend on what is right: it is right once in all answers."""
  from rla_jax.evaluation import harness

  assert set(QUESTIONS) == set(SUITES['commonsense'])
  for name, (asked, key, answers) in QUESTIONS.items():
    write_set(tmp_path, name, [{**asked, key: answer} for answer in answers])
  lm, _ = bigram_lm()
  run = Run(TRAINED, lm.scorer, Settings(data_dir=str(tmp_path)), tmp_path)
  results, skipped = harness.evaluate(run, 'commonsense', list(QUESTIONS))
  assert not skipped
  assert {r.task for r in results} == set(QUESTIONS)
  for r in results:
    assert r.samples == len(QUESTIONS[r.task][2])
    assert r.value == pytest.approx(1 / r.samples), (r.task, r.metric)


def test_damaged_sets_are_named_and_the_others_scored(tmp_path):
  from rla_jax.evaluation import harness

  asked, key, answers = QUESTIONS['boolq']
  write_set(tmp_path, 'boolq', [{**asked, key: answer} for answer in answers])
  write_set(tmp_path, 'piqa', [{'goal': 'To dry'}])
  lm, _ = bigram_lm()
  run = Run(TRAINED, lm.scorer, Settings(data_dir=str(tmp_path)), tmp_path)
  results, skipped = harness.evaluate(run, 'commonsense', ['piqa', 'boolq'])
  assert {r.task for r in results} == {'boolq'}
  assert skipped == {
    'piqa': f"{tmp_path}/piqa.jsonl:1 has no column 'sol1'; its columns: goal"
  }


def test_answers_are_looked_for_in_what_is_generated(tmp_path):
  from rla_jax.evaluation import harness

  assert set(LOOKED_UP) == set(SUITES['recall'])
  lm, _ = bigram_lm(batch_size=2)
  (made,) = lm.generate_until([Request('a', {'until': ['\n'], 'max_gen_toks': 48})], True)
  assert made
  for name, record in LOOKED_UP.items():
    write_set(tmp_path, name, [record, record])
  write_set(tmp_path, 'triviaqa', [LOOKED_UP['triviaqa'], {'context': 'a', 'aliases': ['', made]}])
  settings = Settings(data_dir=str(tmp_path), batch_size=2)
  run = Run(TRAINED, lm.scorer, settings, tmp_path)
  results, skipped = harness.evaluate(run, 'recall', list(LOOKED_UP))
  assert not skipped
  assert {(r.task, r.metric, r.samples, r.value) for r in results} == {
    (name, 'contains', 2, 0.5 if name == 'triviaqa' else 0.0) for name in LOOKED_UP
  }


def test_random_weights_score_at_chance_whatever_the_batch_size(data_dir, tmp_path):
  from rla_jax.evaluation import harness

  model, params, _ = models.bigram()
  settings = Settings(data_dir=str(data_dir), limit=100)
  found = []
  for batch_tokens in (2048, 8192):
    scorer = Scorer(model, params, chunk=512, batch_tokens=batch_tokens)
    run = Run(TRAINED, scorer, settings, tmp_path)
    results, skipped = harness.evaluate(run, 'commonsense', SUITES['commonsense'])
    assert not skipped
    assert len(scorer.shapes) < 12
    found.append({(r.task, r.metric): r.value for r in results})
  assert found[0] == found[1]
  assert {task for task, _ in found[0]} == {*CHANCE, 'boolq'}
  yes = [r['answer'] for r in records.read(records.find(data_dir, 'boolq'))[:100]].count(True) / 100
  assert found[0]['boolq', 'acc'] in (pytest.approx(yes), pytest.approx(1 - yes))
  for task, chance in CHANCE.items():
    five_sigma = 5 * math.sqrt(chance * (1 - chance) / 100)
    assert abs(found[0][task, 'acc'] - chance) < five_sigma, task
  assert np.mean([found[0][t, 'acc'] - c for t, c in CHANCE.items()]) == pytest.approx(0, abs=0.08)


def test_recall_tasks_run_in_few_programs(data_dir, tmp_path):
  from rla_jax.evaluation import harness

  lm, _ = bigram_lm()
  settings = Settings(data_dir=str(data_dir), limit=6, batch_size=2)
  run = Run(TRAINED, lm.scorer, settings, tmp_path)
  programs = generation._read, generation.decode
  for program in programs:
    program.clear_cache()
  results, skipped = harness.evaluate(run, 'recall', ['squad', 'nq', 'drop', 'triviaqa', 'fda'])
  assert 2 <= sum(program._cache_size() for program in programs) < 12
  assert set(skipped) == {'fda'}
  assert [(r.task, r.metric, r.samples) for r in results] == [
    (task, 'contains', 6) for task in ('squad', 'nq', 'drop', 'triviaqa')
  ]


PAGES = (
  ' = A = \n \n = = B = = \n \n = = = C = = = \n 3 @.@ 5 well @-@ known 1 @,@ 000 , it : ; ! . N ',
  'the dogs \' tails , " so " ( a ( b ) ) [ c ] { d } \' e \' it \'s 5 \N{DEGREE SIGN} C /\' 5/ \n',
)


def test_spacing_is_restored_as_the_harness_does():
  from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

  for page in PAGES:
    assert wikitext.restore_spacing(page) == wikitext_detokenizer({'page': page}) != page


def test_spacing_of_the_data_folder_is_restored_as_the_harness_does(data_dir):
  from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

  for record in records.read(records.find(data_dir, *wikitext.NAMES)):
    assert wikitext.restore_spacing(record['page']) == wikitext_detokenizer(record)


def test_tables_are_made_without_a_fork(monkeypatch):
  from lm_eval.utils import make_table

  from rla_jax.evaluation import harness

  def refuse(*args, **kwargs):
    raise AssertionError('a process is forked beside JAX')

  monkeypatch.setattr('concurrent.futures.ProcessPoolExecutor', refuse)
  harness.stay_in_one_process()
  results = {'results': {'piqa': {'alias': 'piqa', 'acc,none': 0.5}}, 'versions': {'piqa': 1}}
  assert '0.5' in make_table(results)
