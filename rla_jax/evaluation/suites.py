"""The suites by name, and the one function that runs them on a trained model."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax

from rla_jax import data, sharding
from rla_jax.data import DataError, sources
from rla_jax.data.synthetic.needle import NEEDLES
from rla_jax.evaluation import (
  figures,
  lambada,
  needle,
  records,
  results,
  synthetic,
  throughput,
  wikitext,
)
from rla_jax.evaluation.perplexity import Text, TextLoss, text_loss
from rla_jax.evaluation.provenance import provenance
from rla_jax.evaluation.results import Result
from rla_jax.evaluation.run import Run, Settings, Skipped
from rla_jax.evaluation.scorer import Scorer
from rla_jax.training.config import check
from rla_jax.training.trained import expect_text, load

# Tasks of each suite.
SUITES = {
  'perplexity': ('text', 'wikitext', 'lambada'),
  'commonsense': (
    'arc_easy', 'arc_challenge', 'piqa', 'mmlu', 'hellaswag', 'winogrande', 'boolq', 'openbookqa',
    'social_iqa', 'commonsense_qa',
  ),
  'recall': ('drop', 'squad', 'nq', 'triviaqa', 'fda', 'swde'),
  'needle': tuple(NEEDLES),
  'mqar': ('mqar', 'mqar_reassigned'),
  'state_tracking': ('parity', 'modular_arithmetic', 'permutations'),
  'throughput': ('throughput',),
}  # fmt: skip


def run_suites(
  workdir: str | os.PathLike,
  names: Sequence[str],
  output: str | os.PathLike,
  settings: Settings | None = None,
) -> tuple[list[Result], dict[str, str]]:
  """Evaluates the newest checkpoint of a run, on one device.

  Writes results.json, results.csv and results.md, and what single tasks have to show. A task that
  has no set or one that cannot be used, or that the model was not made for, is skipped.

  Args:
    workdir: of the training run.
    names: suites or tasks, keys or values of `SUITES`.
    output: folder for the results; made if need be.
    settings: see `Settings`; None: its defaults.

  Returns:
    The numbers, and the tasks that were skipped with the reason of each.

  Raises:
    DataError: an unknown name, or nothing to evaluate on.
    TrainingError: see `rla_jax.training.trained.load`.
  """
  settings = settings or Settings()
  tasks = select(names)
  if settings.stride is not None and settings.stride > (settings.window or 0):
    raise DataError(f'stride is {settings.stride}; expected at most window, {settings.window}')
  if settings.data_dir is not None:
    records.check_folder(settings.data_dir)
  folder = pathlib.Path(output).expanduser()
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    trained = load(workdir, mesh)
    scorer = Scorer(
      trained.model, trained.params, chunk=settings.chunk, batch_tokens=settings.batch_tokens
    )
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(trained, scorer, settings, folder)
    found, skipped = [], {}
    for task in tasks:
      if task in _TASKS:
        try:
          found += _TASKS[task](run)
        except (Skipped, DataError) as reason:
          skipped[task] = str(reason)
    for suite in ('commonsense', 'recall'):
      of_suite = [task for task in tasks if task in SUITES[suite]]
      if of_suite:
        harness_results, harness_skipped = _harness(run, suite, of_suite)
        found += harness_results
        skipped |= harness_skipped
    found += _recall_average(found)
  if not found:
    reasons = '; '.join(f'{task}: {reason}' for task, reason in skipped.items())
    raise DataError(f'there is nothing to evaluate on: {reasons}')
  of_run = {
    'workdir': str(workdir), 'step': trained.step, 'settings': dataclasses.asdict(settings),
    'skipped': skipped,
  }  # fmt: skip
  results.write(folder, found, provenance() | of_run)
  return found, skipped


def select(names: Sequence[str]) -> list[str]:
  """Tasks of suites and tasks, each once, in the order of `SUITES`.

  Raises:
    DataError: an unknown name, or none.
  """
  known = [task for tasks in SUITES.values() for task in tasks]
  chosen: set[str] = set()
  for name in names:
    if name not in SUITES and name not in known:
      raise DataError(
        f'unknown suite or task {name!r}; suites: {", ".join(SUITES)}; tasks: {", ".join(known)}'
      )
    chosen |= set(SUITES.get(name, (name,)))
  if not chosen:
    raise DataError(f'no suite is given; expected some of {", ".join(SUITES)}')
  return [task for task in known if task in chosen]


def _text(run: Run) -> list[Result]:
  config = check(run.trained.config)
  if run.settings.path is None and config.format == 'synthetic':
    raise Skipped(f'the checkpoint was trained on {config.path} and held out no text')
  if run.settings.path is None:
    expect_text(config)
    documents = data.load_documents(config)[1]
  else:
    files = sources.hash_files(sources.find_files(run.settings.path))
    documents = list(sources.read_documents(files, config))
  return _perplexity(run, 'text', [Text(document.text) for document in documents])


def _wikitext(run: Run) -> list[Result]:
  return _perplexity(run, 'wikitext', wikitext.read(run.file(*wikitext.NAMES)))


def _perplexity(run: Run, task: str, documents: Sequence[Text]) -> list[Result]:
  s = run.settings
  loss = text_loss(
    run.scorer, run.trained.tokenizer, documents[: s.limit], window=s.window, stride=s.stride,
    description=task,
  )  # fmt: skip
  _show_positions(run, task, loss)
  values = {
    'word_perplexity': loss.word_perplexity,
    'token_perplexity': loss.token_perplexity,
    'bits_per_byte': loss.bits_per_byte,
    'loss': loss.loss,
  }
  return [Result('perplexity', task, name, x, loss.documents) for name, x in values.items()]


def _show_positions(run: Run, task: str, loss: TextLoss) -> None:
  """Does a long context help? The loss should fall with the position in the document."""
  rows = loss.positions.rows()
  results.write_rows(run.folder / f'{task}_positions.csv', rows)
  middles = [(row['first'] + row['last']) / 2 + 1 for row in rows]
  figures.curves(
    run.folder / f'{task}_positions.png',
    {task: (middles, [row['loss'] for row in rows])},
    'position in the document (tokens)',
    'loss (nats a token)',
  )


def _lambada(run: Run) -> list[Result]:
  texts = lambada.read(run.file(*lambada.NAMES))[: run.settings.limit]
  found = lambada.evaluate(run.scorer, run.trained.tokenizer, texts, 'lambada')
  return [
    Result('perplexity', 'lambada', 'perplexity', found.perplexity, found.samples),
    Result(
      'perplexity', 'lambada', 'accuracy', found.accuracy, found.samples, found.accuracy_stderr
    ),
  ]


def _harness(run: Run, suite: str, tasks: Sequence[str]) -> tuple[list[Result], dict[str, str]]:
  """Tasks that the harness scores."""
  if importlib.util.find_spec('lm_eval') is None:
    return [], {suite: "lm_eval is not installed: pip install -e '.[eval]'"}
  from rla_jax.evaluation import harness

  return harness.evaluate(run, suite, tasks)


def _recall_average(found: Sequence[Result]) -> list[Result]:
  """The mean over the recall tasks that published tables have; only of all of them."""
  scores = [r for r in found if r.suite == 'recall']
  if {r.task for r in scores} != set(SUITES['recall']):
    return []
  mean = sum(r.value for r in scores) / len(scores)
  return [Result('recall', 'recall', 'average', mean, sum(r.samples for r in scores))]


_TASKS: Mapping[str, Callable[[Run], list[Result]]] = {
  'text': _text,
  'wikitext': _wikitext,
  'lambada': _lambada,
  **{task: functools.partial(needle.evaluate, task=task) for task in SUITES['needle']},
  **{
    task: functools.partial(synthetic.evaluate, suite=suite, task=task)
    for suite in ('mqar', 'state_tracking')
    for task in SUITES[suite]
  },
  'throughput': throughput.evaluate,
}
