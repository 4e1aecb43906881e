"""A trained model out of its working directory: to load, to evaluate, to sample from."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rla_jax import data, generation, sharding
from rla_jax.data import sources
from rla_jax.models import LanguageModel
from rla_jax.training.checkpoints import Checkpoints
from rla_jax.training.config import check, model_config, settled
from rla_jax.training.errors import CheckpointError, ConfigError
from rla_jax.training.evaluate import Evaluation, evaluate, loss_sums
from rla_jax.training.feed import share
from rla_jax.training.state import abstract_params
from rla_jax.training.workdir import read_config


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """A model with parameters.

  Attributes:
    config: that it was trained with.
    model: the module.
    params: its parameters, or their running mean if one was kept, on the devices of the mesh.
    tokenizer: what its ids mean.
    step: training steps behind it.
  """

  config: ConfigDict
  model: LanguageModel
  params: Any
  tokenizer: data.Tokenizer
  step: int


def load(workdir: str | os.PathLike, mesh: Mesh) -> TrainedModel:
  """Loads the newest checkpoint that verifies; changes nothing in workdir.

  Args:
    workdir: of `train_and_evaluate`.
    mesh: where the parameters go; any mesh, whatever that of the training was.

  Raises:
    WorkdirError: workdir is none of a training run.
    CheckpointError: it has no checkpoint, or none that verifies.
    DataError: the tokenizer is missing.
  """
  root = pathlib.Path(workdir).expanduser().absolute()
  config = read_config(root)
  tokenizer = data.tokenizer_of(check(config))
  model = LanguageModel(model_config(config, tokenizer.vocab_size))
  found, item = None, 'params' if config.ema_decay is None else 'ema'
  if (root / 'checkpoints').is_dir():
    with Checkpoints(root) as checkpoints:
      found = checkpoints.restore(**{item: abstract_params(model, mesh)})
  if found is None:
    raise CheckpointError(f'{root} has no checkpoint yet')
  step, trees, _ = found
  return TrainedModel(config, model, trees[item], tokenizer, step)


def evaluate_run(
  workdir: str | os.PathLike, path: str | None = None, max_tokens: int | None = None
) -> tuple[int, Evaluation]:
  """Evaluates the newest checkpoint of a run on held-out text.

  Args:
    workdir: of `train_and_evaluate`.
    path: file, folder or glob of the text; None: the documents that the run held out.
    max_tokens: whole documents up to so many tokens; None: all.

  Returns:
    The checkpoint's step, and the evaluation.

  Raises:
    TrainingError: see `load`.
    DataError: the text is missing or damaged, that of the run or of path.
  """
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    trained = load(workdir, mesh)
    data_config = check(trained.config)
    expect_text(data_config, path)
    if path is not None:
      data_config = dataclasses.replace(data_config, validation_path=path)
    corpus = data.load(data_config)
    places = mesh.shape['data']
    parts = settled(trained.config, mesh).accumulate
    rows = -(-data_config.batch_size // parts // places) * places
    batches = data.evaluation_batches(
      data_config, corpus, batch_size=rows, max_tokens=max_tokens,
      **share(mesh),
    )  # fmt: skip
    step = jax.jit(functools.partial(loss_sums, trained.model))
    return trained.step, evaluate(step, trained.params, batches, mesh)


def expect_text(config: data.DataConfig, instead: str | None = None) -> None:
  """Looks for the text of a run that may have been trained from another folder.

  Args:
    config: of the run's data.
    instead: path that is read in place of `validation_path`; None: none.

  Raises:
    DataError: nothing is where a relative path says.
  """
  if config.format == 'synthetic':
    return
  for path in (config.path, config.validation_path if instead is None else None):
    if path is None or pathlib.Path(path).expanduser().is_absolute():
      continue
    try:
      sources.find_files(path)
    except data.DataError as error:
      raise data.DataError(
        f"{error}; a run's relative paths are looked up from the working directory: evaluate it "
        'from where it was trained, or give --path with --suite=text'
      ) from error


def continue_text(
  workdir: str | os.PathLike,
  prompt: str,
  max_new_tokens: int,
  *,
  temperature: float = 0.8,
  top_k: int | None = None,
  top_p: float | None = None,
  seed: int = 0,
) -> str:
  """Text that the newest checkpoint of a run puts behind a prompt at the start of a document.

  Args:
    workdir: of `train_and_evaluate`.
    prompt: the text to continue; may be empty.
    max_new_tokens: tokens to make; fewer if the document ends.
    temperature: divides the logits; 0 takes the most probable token.
    top_k: sample from the k most probable tokens only.
    top_p: sample from the most probable tokens that reach this probability together.
    seed: of the random numbers.

  Raises:
    ConfigError: top_k is larger than the vocabulary.
    DataError: the model was trained on ids and the prompt is text.
  """
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    trained = load(workdir, mesh)
    tokenizer, size = trained.tokenizer, trained.model.config.vocab_size
    if top_k is not None and top_k > size:
      raise ConfigError(f'top_k is {top_k}; expected at most the size of the vocabulary, {size}')
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    made = generation.generate(
      trained.model, trained.params, [tokens], max_new_tokens, temperature=temperature,
      top_k=top_k, top_p=top_p, seed=seed, stop_token=tokenizer.eos_id,
    )  # fmt: skip
  ids = made.tokens[0, : made.lengths[0]]
  # A model's vocabulary may be rounded up: ids beyond the tokenizer's stand for nothing.
  return tokenizer.decode(ids[ids < tokenizer.vocab_size])
