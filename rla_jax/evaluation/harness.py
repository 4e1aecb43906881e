"""Models of this library in the language model evaluation harness (PyPI lm_eval)."""

import os
import tempfile
from collections.abc import Sequence

import jax
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from rla_jax import sharding
from rla_jax.data import Tokenizer
from rla_jax.evaluation import local_tasks
from rla_jax.evaluation.continuations import continue_greedily
from rla_jax.evaluation.likelihood import log_likelihoods
from rla_jax.evaluation.results import Result
from rla_jax.evaluation.run import Run
from rla_jax.evaluation.scorer import Scorer
from rla_jax.training.trained import load


@register_model('rla_jax')
class RlaJaxLM(TemplateLM):
  """The newest checkpoint of a training run, on one device.

  `--model rla_jax --model_args workdir=runs/mine,chunk=2048,batch_tokens=16384 --batch_size 16`;
  the batch size is that of generation. Contexts of any length run in chunks with the state carried.
  """

  def __init__(
    self,
    workdir: str | None = None,
    *,
    scorer: Scorer | None = None,
    tokenizer: Tokenizer | None = None,
    chunk: int = 2048,
    batch_tokens: int = 16384,
    batch_size: int | str = 16,
    max_batch_size: int | None = None,
    device: str | None = None,
    max_gen_toks: int = 256,
  ):
    """Loads a run, or wraps a scorer with its tokenizer.

    Args:
      workdir: of the training run.
      scorer: instead of a run.
      tokenizer: that goes with the scorer.
      chunk: see `Scorer`.
      batch_tokens: see `Scorer`.
      batch_size: prompts that are continued together; 'auto': 16.
      max_batch_size: ignored, as shapes are fixed.
      device: ignored: it is JAX's first; set JAX_PLATFORMS to choose.
      max_gen_toks: tokens of a continuation, unless the task says.

    Raises:
      ValueError: neither or both of workdir and scorer.
    """
    super().__init__()
    del max_batch_size, device
    if (workdir is None) == (scorer is None):
      raise ValueError('expected either workdir (in --model_args) or scorer')
    if workdir is not None:
      mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
      trained = load(workdir, mesh)
      tokenizer = trained.tokenizer
      scorer = Scorer(
        trained.model, trained.params, chunk=int(chunk), batch_tokens=int(batch_tokens)
      )
    self.scorer, self._tokenizer = scorer, tokenizer
    self.batch_size = 16 if str(batch_size).startswith('auto') else int(batch_size)
    self._max_gen_toks = int(max_gen_toks)

  @property
  def eot_token_id(self) -> int:
    """Closes a document."""
    return self._tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """Opens a document."""
    return self._tokenizer.bos_id

  @property
  def tokenizer_name(self) -> str:
    """Key of the harness's caches."""
    return f'{self._tokenizer.name}-{self._tokenizer.fingerprint[:16]}'

  @property
  def max_length(self) -> int:
    """A bound that no text reaches: the state has a constant size."""
    return 2**30

  @property
  def max_gen_toks(self) -> int:
    """Tokens of a continuation, unless the task says."""
    return self._max_gen_toks

  def tok_encode(self, string, add_special_tokens=None, **kwargs):
    """Ids of a text; bos is added where sequences are scored."""
    del add_special_tokens, kwargs
    return self._tokenizer.encode(string).tolist()

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
    del kwargs
    pairs = [(context, continuation) for _, context, continuation in requests]
    description = None if disable_tqdm else 'log likelihoods'
    found = log_likelihoods(self.scorer, self.prefix_token_id, pairs, description)
    return [tuple(likelihood) for likelihood in found]

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    """ln p of whole texts, each read from its beginning with the state carried."""
    pairs = [([], self.tok_encode(request.args[0])) for request in requests]
    description = None if disable_tqdm else 'texts'
    found = log_likelihoods(self.scorer, self.prefix_token_id, pairs, description)
    return [likelihood.log_likelihood for likelihood in found]

  def generate_until(self, requests, disable_tqdm=False):
    """Greedy continuations up to the task's stop strings.

    Raises:
      ValueError: the task asks for sampling.
    """
    groups: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
      options = request.args[1]
      if options.get('do_sample') and options.get('temperature', 1.0) > 0:
        raise ValueError('do_sample is True; expected greedy generation')
      groups.setdefault(options.get('max_gen_toks', self.max_gen_toks), []).append(i)
    found = [''] * len(requests)
    for tokens, index in groups.items():
      prompts = [requests[i].args[0] for i in index]
      until = [_strings(requests[i].args[1].get('until', ())) for i in index]
      texts = continue_greedily(
        self.scorer, self._tokenizer, prompts, until, tokens, batch_size=self.batch_size,
        description=None if disable_tqdm else 'continuations',
      )  # fmt: skip
      for i, text in zip(index, texts, strict=True):
        found[i] = text
    return found


def evaluate(
  run: Run, suite: str, tasks: Sequence[str]
) -> tuple[list[Result], dict[str, str]]:
  """Runs local tasks through the harness.

  Args:
    run: the model and the settings.
    suite: that the results are filed under.
    tasks: keys of `local_tasks.TASKS`.

  Returns:
    Results, and the tasks that were skipped with the reason of each.

  Raises:
    DataError: see `local_tasks.write`.
  """
  settings = run.settings
  if settings.data_dir is None:
    return [], dict.fromkeys(tasks, 'no data_dir is given')
  go_offline()
  with tempfile.TemporaryDirectory() as folder:
    written, absent, damaged = local_tasks.write(folder, settings.data_dir, tasks)
    skipped = absent | damaged
    if not written:
      return [], skipped
    lm = RlaJaxLM(
      scorer=run.scorer, tokenizer=run.trained.tokenizer, batch_size=settings.batch_size
    )
    # All metrics are means, whose standard errors need no resampling; 0 would leave them out.
    found = simple_evaluate(
      lm, tasks=written, limit=settings.limit, log_samples=False, bootstrap_iters=1,
      task_manager=TaskManager(include_path=folder, include_defaults=False),
    )  # fmt: skip
  return [r for task in written for r in _results(found, suite, task)], skipped


def go_offline() -> None:
  """Keeps the harness's libraries from looking for anything on the network."""
  os.environ.setdefault('HF_HUB_OFFLINE', '1')
  os.environ.setdefault('HF_DATASETS_OFFLINE', '1')


def stay_in_one_process() -> None:
  """Keeps the harness from forking to format its table: with JAX running, a fork may never end."""
  from dataproperty import DataPropertyExtractor as Extractor

  convert = Extractor.to_dp_matrix
  if convert.__name__ == 'in_this_process':
    return

  def in_this_process(extractor, matrix):
    extractor.max_workers = 1
    return convert(extractor, matrix)

  Extractor.to_dp_matrix = in_this_process


def _results(found: dict, suite: str, task: str) -> list[Result]:
  samples = found['n-samples'][task]['effective']
  numbers = found['results'][task]
  results = []
  for key, value in numbers.items():
    metric, _, filter_name = key.partition(',')
    if filter_name != 'none' or metric.endswith('_stderr'):
      continue
    stderr = numbers.get(f'{metric}_stderr,{filter_name}')
    stderr = stderr if isinstance(stderr, float) else None
    results.append(Result(suite, task, metric, float(value), samples, stderr))
  return results


def _strings(until) -> list[str]:
  return [until] if isinstance(until, str) else list(until)
