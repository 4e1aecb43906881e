"""Task files of the language model evaluation harness for sets in a folder, written at run time.

The prompts and metrics are the harness's own; the sets are read from jsonl files with the columns
of the Hugging Face hub, so that nothing is downloaded. MMLU is one task over all subjects, without
examples. Recall tasks end in the question or the key, and the answer is looked for in the line that
the model generates (arXiv:2402.18668).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from rla_jax.data import DataError
from rla_jax.evaluation import records


@dataclasses.dataclass(frozen=True)
class LocalTask:
  """One task.

  Attributes:
    files: names of its set, without suffix.
    columns: that the set must have.
    fields: of the harness's YAML.
    values: see `records.read`.
  """

  files: tuple[str, ...]
  columns: tuple[str, ...]
  fields: dict[str, Any]
  values: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


def _choices(files, columns, text, target, choice, *metrics, values=None) -> LocalTask:
  metrics = [{'metric': m, 'aggregation': 'mean', 'higher_is_better': True} for m in metrics]
  return LocalTask(files, columns, {
    'output_type': 'multiple_choice', 'doc_to_text': text, 'doc_to_target': target,
    'doc_to_choice': choice, 'metric_list': metrics,
  }, values or {})  # fmt: skip


def _recall(files, columns, text, answers) -> LocalTask:
  return LocalTask(files, columns, {
    'output_type': 'generate_until', 'doc_to_text': text, 'doc_to_target': answers,
    'process_results': '!function recall.process_results',
    'generation_kwargs': {'until': ['\n'], 'max_gen_toks': 48, 'do_sample': False},
    'metric_list': [{'metric': 'contains', 'aggregation': 'mean', 'higher_is_better': True}],
  })  # fmt: skip


_LETTERED = (
  '{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n'
  'D. {{choices[3]}}\nAnswer:'
)
_FIVE = '\n'.join(f'{letter}. {{{{choices.text[{i}]}}}}' for i, letter in enumerate('ABCDE'))
_ARC = (
  ('question', 'choices', 'answerKey'), 'Question: {{question}}\nAnswer:',
  '{{choices.label.index(answerKey)}}', '{{choices.text}}', 'acc', 'acc_norm',
)  # fmt: skip
_DOCUMENT = (('text', 'value'), '{{text}}', '{{[value]}}')

TASKS = {
  'arc_easy': _choices(('arc_easy',), *_ARC),
  'arc_challenge': _choices(('arc_challenge',), *_ARC),
  'piqa': _choices(
    ('piqa',), ('goal', 'sol1', 'sol2', 'label'), 'Question: {{goal}}\nAnswer:', '{{label}}',
    '{{[sol1, sol2]}}', 'acc', 'acc_norm',
  ),
  'mmlu': _choices(
    ('mmlu_test', 'mmlu'), ('question', 'subject', 'choices', 'answer'),
    'The following are multiple choice questions (with answers) about '
    "{{subject|replace('_', ' ')}}.\n\n" + _LETTERED,
    '{{answer}}', ['A', 'B', 'C', 'D'], 'acc',
  ),
  'hellaswag': _choices(
    ('hellaswag', 'hellaswag_1000'), ('query', 'choices', 'label'), '{{query}}', '{{label}}',
    '{{choices}}', 'acc', 'acc_norm',
  ),
  'winogrande': _choices(
    ('winogrande',), ('sentence', 'option1', 'option2', 'answer'),
    '{{(answer|int) - 1}}', "{{sentence.split('_', 1)[1].strip()}}",
    "{{[sentence.split('_', 1)[0] + option1, sentence.split('_', 1)[0] + option2]}}", 'acc',
  ),
  'boolq': _choices(
    ('boolq',), ('passage', 'question', 'answer'),
    '{{passage}}\nQuestion: {{question}}?\nAnswer:', '{{answer|int}}', ['no', 'yes'], 'acc',
    values={'answer': ('false', 'true', '0', '1')},  # Anything that is no number would be a no.
  ),
  'openbookqa': _choices(
    ('openbookqa',), ('question_stem', 'choices', 'answerKey'), '{{question_stem}}',
    '{{choices.label.index(answerKey)}}', '{{choices.text}}', 'acc', 'acc_norm',
  ),
  'social_iqa': _choices(
    ('social_iqa',), ('context', 'question', 'answerA', 'answerB', 'answerC', 'label'),
    'Q: {{context}} {{question}}\nA:', '{{(label|int) - 1}}', '{{[answerA, answerB, answerC]}}',
    'acc',
  ),
  'commonsense_qa': _choices(
    ('commonsense_qa',), ('question', 'choices', 'answerKey'),
    'Question: {{question.strip()}}\n' + _FIVE + '\nAnswer:',
    '{{choices.label.index(answerKey)}}', ['A', 'B', 'C', 'D', 'E'], 'acc',
  ),
  'drop': _recall(
    ('drop_dev', 'drop'), ('passage', 'question', 'answers'),
    '{{passage}}\nQuestion: {{question}}\nAnswer:', '{{answers}}',
  ),
  'squad': _recall(
    ('squad_v1', 'squad', 'squad_v1_1000'), ('title', 'context', 'question', 'answers'),
    'Title: {{title}}\n\n{{context}}\n\nQuestion: {{question}}\nAnswer:', '{{answers.text}}',
  ),
  'nq': _recall(
    ('nq_open', 'nq'), ('question', 'answer'), 'Question: {{question}}?\nAnswer:', '{{answer}}'
  ),
  'triviaqa': _recall(
    ('triviaqa', 'triviaqa_nocontext_3000'), ('context', 'aliases'), '{{context}}', '{{aliases}}'
  ),
  'fda': _recall(('fda', 'based_fda'), *_DOCUMENT),
  'swde': _recall(('swde', 'based_swde'), *_DOCUMENT),
}  # fmt: skip

_RECALL_MODULE = '''"""Metric of the recall tasks."""

from rla_jax.evaluation.local_tasks import contains


def process_results(doc, results):
  """Whether an answer is in the generated line."""
  names = ('aliases', 'value', 'answers', 'answer')
  target = next((doc[name] for name in names if doc.get(name)), ())
  answers = target['text'] if isinstance(target, dict) else target
  return {'contains': contains(results[0], [answers] if isinstance(answers, str) else answers)}
'''


def contains(text: str, answers: Sequence[str]) -> float:
  """1 if one of the answers stands in the text, in any case of letters; else 0."""
  return float(any(answer.lower() in text.lower() for answer in answers if answer))


def write(
  folder: str | os.PathLike, data_dir: str | os.PathLike, names: Sequence[str] | None = None
) -> tuple[list[str], dict[str, str], dict[str, str]]:
  """Writes the YAML files of the tasks whose sets are there and can be used.

  Args:
    folder: where to; exists.
    data_dir: folder of the sets.
    names: tasks; None: all.

  Returns:
    The tasks that were written; with the reason of each, those whose set is absent, and those whose
    set is damaged, empty, or has other columns or values.

  Raises:
    DataError: data_dir is no folder.
  """
  folder = pathlib.Path(folder)
  written, absent, damaged = [], {}, {}
  for name in TASKS if names is None else names:
    task = TASKS[name]
    path = records.find(data_dir, *task.files)
    if path is None:
      absent[name] = records.absent(data_dir, *task.files)
      continue
    try:
      records.read(path, task.columns, task.values)
    except DataError as error:
      damaged[name] = str(error)
      continue
    (folder / f'{name}.yaml').write_text(_yaml(name, path, task))
    written.append(name)
  (folder / 'recall.py').write_text(_RECALL_MODULE)
  return written, absent, damaged


def _yaml(name: str, path: pathlib.Path, task: LocalTask) -> str:
  fields = {
    'task': name,
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(path.resolve())}},
    'test_split': 'test',
    'num_fewshot': 0,
    **task.fields,
    'metadata': {'version': 1},
  }
  # JSON is YAML, but for the harness's tag of a Python function.
  lines = []
  for key, value in fields.items():
    tagged = isinstance(value, str) and value.startswith('!function')
    lines.append(f'{key}: {value if tagged else json.dumps(value)}')
  return '\n'.join(lines) + '\n'
