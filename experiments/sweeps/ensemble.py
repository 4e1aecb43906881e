"""Trains many small models at once: the training step under vmap, a whole set in one dispatch.

It makes sweeps affordable. A model of the Based setting has half a million parameters and its run
22,624 steps; with four learning rates and three seeds, two mixers at two widths are a million steps
that the training loop would dispatch and feed one by one. Here all members (learning rates and
seeds) of a mixer at a width take a step together on the same batch, `lax.scan` runs a set of
batches in one dispatch, and several devices share the members.

Step, model, optimiser, initialisation, data and their order are those of `rla_jax.training`: a
member equals the run of its config up to rounding (tested). Only the loop is another one, and
logits exist only where there is a target.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from rla_jax.data import DataConfig
from rla_jax.data.synthetic.corpus import SyntheticCorpus
from rla_jax.models import LanguageModel
from rla_jax.training import ConfigError
from rla_jax.training.config import check, leaves, model_config
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.state import initializer
from rla_jax.training.step import train_step
from sweeps.arrays import evaluation_arrays, shapes_of, training_arrays


@dataclasses.dataclass(frozen=True)
class Member:
  """One run of an ensemble.

  Attributes:
    learning_rate: the peak.
    seed: of the initial parameters and of dropout; the data are everybody's.
  """

  learning_rate: float
  seed: int


class Ensemble:
  """Runs of one config that differ in learning rate and seed.

  Attributes:
    members: the runs.
    epoch: epochs done.
    curve: one record a member and evaluation: epoch, learning_rate, seed, loss (mean of the last
      epoch), accuracy (mean of the test sets), and the accuracy on every test set by its name.
  """

  def __init__(self, config: ConfigDict, members: Sequence[Member], folder: str | os.PathLike):
    """Takes up the runs where the folder leaves them, or begins.

    Args:
      config: of every run, but for learning rate and seed; data of `format='synthetic'`.
      members: the runs.
      folder: for the state; made if need be.

    Raises:
      ConfigError: the steps are less than an epoch, or several sets are shuffled into each other.
      ValueError: the folder holds another ensemble.
    """
    self._config, self.members = config, tuple(members)
    self._folder = pathlib.Path(folder)
    self._folder.mkdir(parents=True, exist_ok=True)
    corpus = _corpus(check(config))
    self._model = LanguageModel(model_config(config, corpus.tokenizer.vocab_size))
    optimizer = make_optimizer(config)
    self._rates = jnp.array([m.learning_rate for m in self.members], jnp.float32)
    self._seeds = jnp.array([m.seed for m in self.members], jnp.int32)
    member_step = functools.partial(_member_step, self._model, optimizer, config)
    mesh = _mesh(len(self.members))
    mine, everybody = P('members'), P()
    self._place, self._everybody = NamedSharding(mesh, mine), NamedSharding(mesh, everybody)
    over_devices = functools.partial(jax.shard_map, mesh=mesh, out_specs=mine, check_vma=False)
    self._train = jax.jit(
      over_devices(
        functools.partial(_train_set, member_step),
        in_specs=(mine, mine, mine, everybody, everybody),
      ),
      donate_argnums=0,
    )
    self._score = jax.jit(
      over_devices(functools.partial(_correct, self._model), in_specs=(mine, everybody))
    )
    self._train_sets, self._test_sets = jax.device_put(
      (
        training_arrays(corpus.train.sets, config.data.batch_size),
        evaluation_arrays(corpus.validation.sets, len(self.members)),
      ),
      self._everybody,
    )
    if not self.epochs:
      raise ConfigError(f'steps is {config.steps}; expected at least an epoch, {self._epoch_steps}')
    if corpus.shuffled and len(self._train_sets) > 1:
      raise ConfigError(f'data.path is {config.data.path!r}, whose sets are shuffled; expected one')
    self._order = corpus.order(self._epoch_steps, config.data.seed) if corpus.shuffled else None
    self._rates, self._seeds = jax.device_put((self._rates, self._seeds), self._place)
    init = jax.vmap(lambda seed: initializer(self._model, optimizer)(jax.random.key(seed)))
    self._state = jax.jit(init, out_shardings=self._place)(self._seeds)
    self.epoch, self.curve = 0, []
    self._restore()
    self._compiled = self._compile()

  @property
  def epochs(self) -> int:
    """Epochs of the whole run."""
    return self._config.steps // self._epoch_steps

  @property
  def _epoch_steps(self) -> int:
    return sum(len(arrays['mask']) for arrays in self._train_sets)

  def run(
    self,
    evaluate_every: int = 4,
    report: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
  ) -> bool:
    """Trains to the end, or until it is asked to stop: then the folder has the state.

    Args:
      evaluate_every: epochs between evaluations; the last one always has one.
      report: takes a line an evaluation.
      stop: asked after every epoch.

    Returns:
      Whether it came to the end.
    """
    while self.epoch < self.epochs:
      losses = self._train_epoch()
      self.epoch += 1
      last = self.epoch == self.epochs
      if last or self.epoch % evaluate_every == 0:
        self._evaluate(losses)
        rows = self.curve[-len(self.members) :]
        found = ' '.join(f'{row["accuracy"]:.3f}' for row in rows)
        report(f'epoch {self.epoch}/{self.epochs}  loss {np.mean(losses):.4f}  accuracy {found}')
      if not last and stop():
        self.save()
        return False
    return True

  def save(self) -> None:
    """Writes the state, so that another process can go on from it."""
    partial = self._folder / 'state.npz.partial'
    arrays = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(self._state))}
    record = {'epoch': self.epoch, 'curve': self.curve, 'identity': self._identity()}
    with partial.open('wb') as file:
      np.savez(file, record=np.array(json.dumps(record)), **arrays)
    partial.replace(self._folder / 'state.npz')

  def _restore(self) -> None:
    path = self._folder / 'state.npz'
    if not path.exists():
      return
    with np.load(path) as file:
      record = json.loads(str(file['record']))
      if record['identity'] != self._identity():
        raise ValueError(f'{path} is of another config or of other members; choose another folder')
      structure = jax.tree.structure(self._state)
      arrays = [file[str(i)] for i in range(structure.num_leaves)]
    self._state = jax.device_put(jax.tree.unflatten(structure, arrays), self._place)
    self.epoch, self.curve = record['epoch'], record['curve']

  def _identity(self) -> list:
    values = json.loads(json.dumps(leaves(self._config)))
    return [values, [list(dataclasses.astuple(m)) for m in self.members]]

  def _compile(self) -> dict:
    """The programs by the shapes of a set, compiled side by side."""
    jobs = {}
    for arrays in self._train_sets:
      arguments = self._state, self._rates, self._seeds, arrays, self._numbers(arrays)
      jobs[shapes_of(arrays)] = self._train, arguments
    for batches in self._test_sets.values():
      jobs[shapes_of(batches[0])] = (self._score, (self._state.params, batches[0]))
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
      futures = {
        shapes: pool.submit(lambda f=function, a=arguments: f.lower(*a).compile())
        for shapes, (function, arguments) in jobs.items()
      }
      return {shapes: future.result() for shapes, future in futures.items()}

  def _train_epoch(self) -> np.ndarray:
    """Mean loss of each member's steps; NaN where one was skipped."""
    sums = 0.0
    for arrays in self._train_sets:
      program = self._compiled[shapes_of(arrays)]
      numbers = self._numbers(arrays)
      self._state, losses = program(self._state, self._rates, self._seeds, arrays, numbers)
      sums += losses
    return np.asarray(sums) / self._epoch_steps

  def _numbers(self, arrays) -> jax.Array:
    """The batches of a set in the order of this epoch."""
    count = len(arrays['mask'])
    numbers = np.arange(count, dtype=np.int32)
    if self._order is not None:
      numbers = np.array([self._order[self.epoch * count + i] for i in range(count)], np.int32)
    return jax.device_put(numbers, self._everybody)

  def _evaluate(self, losses: np.ndarray) -> None:
    found = {}
    for name, batches in self._test_sets.items():
      program = self._compiled[shapes_of(batches[0])]
      right = sum(program(self._state.params, batch) for batch in batches)
      found[name] = np.asarray(right) / sum(batch['mask'].sum() for batch in batches)
    for i, member in enumerate(self.members):
      by_set = {name: float(values[i]) for name, values in found.items()}
      self.curve.append({
        'epoch': self.epoch, **dataclasses.asdict(member), 'loss': float(losses[i]),
        'accuracy': float(np.mean(list(by_set.values()))), **by_set,
      })  # fmt: skip


def _mesh(members: int) -> Mesh:
  """As many devices as divide the members."""
  count = math.gcd(members, len(jax.devices()))
  return jax.make_mesh((count,), ('members',), (AxisType.Auto,), devices=jax.devices()[:count])


class _Overridden:
  """A config with some values replaced, by arrays too, which a ConfigDict would refuse."""

  def __init__(self, config: ConfigDict, values: dict[str, Any]):
    self._config, self._values = config, values

  def __getattr__(self, name):
    found = self._values.get(name, getattr(self._config, name))
    if isinstance(found, dict):
      return _Overridden(getattr(self._config, name), found)
    return found


def _member_step(model, optimizer, config, state, rate, seed, batch):
  overridden = _Overridden(config, {'seed': seed, 'optimizer': {'learning_rate': rate}})
  return train_step(
    state, batch, loss_sums=functools.partial(_loss_sums, model), optimizer=optimizer,
    config=overridden,
  )  # fmt: skip


def _loss_sums(model, params, batch):
  nll_BN, _ = model.apply(
    {'params': params}, batch['tokens'], batch['positions'], batch['targets'],
    keys=batch.get('keys'), method='score_at',
  )  # fmt: skip
  return (batch['mask'] * nll_BN).sum(), batch['mask'].sum()


def _train_set(member_step, states, rates, seeds, batches, numbers):
  """The batches of these numbers, one step each. Returns states, each member's sum of losses."""

  def body(states, number):
    batch = jax.tree.map(lambda x: x[number], batches)
    states, results = jax.vmap(member_step, in_axes=(0, 0, 0, None))(states, rates, seeds, batch)
    return states, results['loss']

  states, losses = jax.lax.scan(body, states, numbers)
  return states, losses.sum(axis=0)


def _correct(model, params, batch):
  """How many targets each member says."""
  asked = batch['tokens'], batch['positions'], batch['targets']

  def of(params):
    scores = model.apply({'params': params}, *asked, method='score_at')
    return (batch['mask'] * scores.correct).sum()

  return jax.vmap(of)(params)


@functools.lru_cache(maxsize=4)
def _corpus(config: DataConfig) -> SyntheticCorpus:
  return SyntheticCorpus.load(config)
