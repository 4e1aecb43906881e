"""Needle in a haystack: accuracy by length of the text and depth of the needle.

Samples are drawn from a seed (`rla_jax.data.synthetic.needle`), so every model of a tokenizer gets
the same. The model continues them greedily through the recurrent step, whose state has a constant
size; a continuation with the value in it is right. Essays come from a path, from the data folder,
or, if there is neither, from the reference manual that comes with Python: the results name it.
"""

import dataclasses
import math

import numpy as np

from rla_jax.data import sources
from rla_jax.data.synthetic.needle import NEEDLES, Haystacks, Sample, manual
from rla_jax.evaluation import figures, records, results
from rla_jax.evaluation.continuations import continue_greedily
from rla_jax.evaluation.local_tasks import contains
from rla_jax.evaluation.results import Result
from rla_jax.evaluation.run import Run, Skipped
from rla_jax.training.config import check

LENGTHS = (1024, 2048, 4096, 8192)
SAMPLES = 500  # of each length
BINS = 10  # of depth, in tables and figures
ESSAYS = ('haystack_public_domain', 'haystack')
_NEW_TOKENS = 128


def evaluate(run: Run, task: str) -> list[Result]:
  """Runs a task of `NEEDLES`; writes {task}.csv and {task}.png.

  Raises:
    Skipped: the model does not read text.
  """
  if run.trained.config.data.format == 'synthetic' and run.trained.tokenizer.name == 'ids':
    raise Skipped('the model was trained on ids, not on text')
  essay, origin = '', None
  if NEEDLES[task].haystack == 'essay':
    essay, origin = read_essay(run)
  tokenizer, rows, found = run.trained.tokenizer, [], []

  def count(text):
    return len(tokenizer.encode(text)) + 1  # with bos

  for length in run.settings.lengths or LENGTHS:
    haystacks = Haystacks(task, length, count, essay)
    rng = np.random.default_rng(length)
    samples = [haystacks.draw(rng) for _ in range(run.settings.limit or SAMPLES)]
    right = _right(run, task, length, samples)
    mean = float(right.mean())
    stderr = math.sqrt(mean * (1 - mean) / max(1, len(right) - 1))
    found.append(Result('needle', task, f'accuracy_{length}', mean, len(right), stderr))
    rows += _by_depth(length, samples, right)
  if origin is not None:
    rows = [row | {'haystack': origin} for row in rows]
  results.write_rows(run.folder / f'{task}.csv', rows)
  _show(run, task, rows)
  return found


def read_essay(run: Run) -> tuple[str, str]:
  """The text of the haystacks, and where it is from."""
  if run.settings.path is not None:
    files = sources.hash_files(sources.find_files(run.settings.path))
    config = dataclasses.replace(check(run.trained.config), format='auto')
    texts = (document.text.decode() for document in sources.read_documents(files, config))
    return ' '.join(texts), run.settings.path
  if run.settings.data_dir is not None:
    path = records.find(run.settings.data_dir, *ESSAYS)
    if path is not None:
      return ' '.join(record['text'] for record in records.read(path, ['text'])), path.name
  return manual(), "Python's reference manual (pydoc_data)"


def _right(run: Run, task: str, length: int, samples: list[Sample]) -> np.ndarray:
  longest = max(len(run.trained.tokenizer.encode(f' {s.answer}')) for s in samples)
  texts = continue_greedily(
    run.scorer, run.trained.tokenizer, [s.prompt for s in samples], [()] * len(samples),
    min(_NEW_TOKENS, 32 * -(-2 * longest // 32)), batch_size=run.settings.batch_size,
    description=f'{task} {length}',
  )  # fmt: skip
  return np.array([contains(t, [s.answer]) for t, s in zip(texts, samples, strict=True)])


def _by_depth(length: int, samples: list[Sample], right: np.ndarray) -> list[dict]:
  depths = np.array([s.depth for s in samples])
  bins = np.minimum((depths * BINS / 100).astype(int), BINS - 1)
  return [
    {
      'length': length, 'depth': int(100 * (b + 0.5) / BINS), 'samples': int((bins == b).sum()),
      'accuracy': float(right[bins == b].mean()),
    }
    for b in range(BINS)
    if (bins == b).any()
  ]  # fmt: skip


def _show(run: Run, task: str, rows: list[dict]) -> None:
  lengths = sorted({row['length'] for row in rows})
  depths = [int(100 * (b + 0.5) / BINS) for b in range(BINS)]
  cells = np.full((BINS, len(lengths)), np.nan)
  for row in rows:
    cells[depths.index(row['depth']), lengths.index(row['length'])] = row['accuracy']
  figures.heat_map(
    run.folder / f'{task}.png', cells, [f'{n:,}' for n in lengths], [f'{d}' for d in depths],
    'tokens', 'depth of the needle (%)', task,
  )  # fmt: skip
