"""Tokens a second and memory against length: training step, prefill, decode.

A training step takes about as many tokens at every length, in one piece; prefill and decode run as
many sequences as such a batch holds. Parameters, tokens and what a decode finds in its cache do not
matter here: they are random, or zeros. Programs are compiled a few at a time, side by side, and
timed while nothing is compiled. Time is the median of repetitions after a first one. Memory of a
training step is what the compiler lays out for its arguments, results and temporaries; of prefill
and decode it is parameters and cache. What does not fit is a row without numbers. On NVIDIA GPUs
training step and prefill of softmax attention are FlashAttention, its decode is XLA's products.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import math
import os
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rla_jax import generation
from rla_jax.data import DataError
from rla_jax.evaluation import figures, results
from rla_jax.evaluation.provenance import commit, today
from rla_jax.evaluation.results import Result
from rla_jax.evaluation.run import Run
from rla_jax.models import LanguageModel, ModelConfig
from rla_jax.training.optimizer import make_optimizer
from rla_jax.training.progress import duration
from rla_jax.training.state import initializer
from rla_jax.training.step import train_step

LENGTHS = tuple(2048 * 2**n for n in range(7))  # 2K to 128K
DECODED, BLOCK = 128, 32  # tokens of a decode, and in one call of it
REPETITIONS, ENOUGH = 5, 2.0  # times measured; two will do where they took so many seconds
KINDS = ('train', 'prefill', 'decode')
COMPILERS = min(24, os.cpu_count() or 1)  # programs that are compiled side by side


@dataclasses.dataclass(frozen=True)
class Timing:
  """A measurement.

  Attributes:
    seconds: of one call, the median.
    tokens: of one call.
    memory: bytes; None: not known.
  """

  seconds: float
  tokens: int
  memory: int | None

  @property
  def rate(self) -> float:
    """Tokens a second."""
    return self.tokens / self.seconds


def evaluate(run: Run) -> list[Result]:
  """Measures the model of a run; writes throughput.csv and six figures."""
  s = run.settings
  rows = measure(
    run.trained.model.config, run.trained.config, run.folder, mixers=s.mixers,
    lengths=s.lengths or LENGTHS, batch_tokens=s.batch_tokens, chunk=s.chunk,
  )  # fmt: skip
  return [
    Result(
      'throughput', 'throughput', f'{r["kind"]}_{r["mixer"]}_{r["length"]} tokens/s',
      r['tokens_per_second'], REPETITIONS,
    )
    for r in rows
    if r['tokens_per_second'] is not None
  ]  # fmt: skip


def measure(
  own: ModelConfig,
  config: ConfigDict,
  folder: str | os.PathLike,
  *,
  mixers: Sequence[str] | None = None,
  lengths: Sequence[int] = LENGTHS,
  batch_tokens: int = 16384,
  chunk: int = 2048,
  kinds: Sequence[str] = KINDS,
  known: Sequence[dict] = (),
  budget: float = math.inf,
  say: Callable[[str], None] = lambda line: None,
) -> list[dict]:
  """Measures mixers at lengths; writes throughput.csv and two figures a kind.

  Args:
    own: the model.
    config: of training, for its optimiser.
    folder: for the results; exists.
    mixers: layers, each in place of all the model's; None: the model as it is.
    lengths: tokens of a sequence.
    batch_tokens: tokens of a batch, which holds at least one sequence.
    chunk: prompt tokens in one call of the model.
    kinds: some of `KINDS`.
    known: rows of an earlier call; those of the same model and device are not measured again.
    budget: seconds after which nothing more is compiled, and what is compiled is still measured.
    say: takes a line a measurement.

  Returns:
    The rows of the table.

  Raises:
    DataError: an unknown mixer or kind.
  """
  unknown = [kind for kind in kinds if kind not in KINDS]
  if unknown:
    raise DataError(f'kind {unknown[0]!r}; expected some of {", ".join(KINDS)}')
  models = [
    LanguageModel(own if mixer is None else with_mixer(own, mixer)) for mixer in mixers or (None,)
  ]
  commit()  # before results are written into the checkout
  begin, folder, rows = time.perf_counter(), pathlib.Path(folder), list(known)
  plan = []
  for kind, model, length in _in_order(kinds, models, lengths):
    count = max(1, batch_tokens // length)
    identity = {
      'kind': kind, 'mixer': ' '.join(dict.fromkeys(model.config.pattern)), 'length': length,
      'sequences': count, 'device': jax.devices()[0].device_kind, 'model': _digest(model.config),
    }  # fmt: skip
    name = f'{identity["mixer"]} {kind} {count} x {length}'
    if any(identity.items() <= row.items() for row in rows):
      say(f'{name}: measured before')
    else:
      start = functools.partial(_prepare, model, count, length, kind, config, chunk)
      plan.append((identity, name, start))
  number = 0
  for group in _groups(plan):
    if time.perf_counter() - begin > budget:
      say(f'{group[0][1]}: left for another call, the budget is spent')
      break
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
      calls = list(pool.map(_attempt, [start for _, _, start in group]))
    say(f'{len(group)} programs ready {duration(time.perf_counter() - begin)} after the start')
    for (identity, name, start), call in zip(group, calls, strict=True):
      number += 1
      # What did not fit beside the others may fit alone.
      timing = _attempt(call if call else lambda start=start: start()())
      rows.append(identity | {
        'tokens_per_second': timing and timing.rate, 'seconds': timing and timing.seconds,
        'memory_bytes': timing and timing.memory, 'date': today(), 'commit': commit() or 'unknown',
        'jax': jax.__version__,
      })  # fmt: skip
      results.write_rows(folder / 'throughput.csv', rows)
      rate = 'does not fit' if timing is None else f'{timing.rate:,.0f} tokens/s'
      say(f'{number} of {len(plan)}, {name}: {rate}')
    del calls, call  # and with them this model's parameters
    _made_params.cache_clear()
    jax.clear_caches()
  draw(folder, kinds, rows)
  return rows


def with_mixer(config: ModelConfig, mixer: str) -> ModelConfig:
  """The same model with one mixer in all its layers.

  Raises:
    DataError: an unknown mixer.
  """
  options = {mixer: config.layer_options[mixer]} if mixer in config.layer_options else {}
  try:
    return dataclasses.replace(config, pattern=(mixer,), layer_options=options)
  except ValueError as error:
    raise DataError(f'mixer {mixer!r}: {error}') from error


def with_fused_attention(config: ModelConfig) -> ModelConfig:
  """The config with FlashAttention (cuDNN's) in its softmax layers, where the device has it."""
  half = config.dtype in ('bfloat16', 'float16')
  fused = jax.default_backend() == 'gpu' and half
  layers = {'attention', 'sliding_window_attention'} & set(config.pattern) if fused else ()
  options = {
    layer: {'implementation': 'cudnn', **config.layer_options.get(layer, {})} for layer in layers
  }
  return dataclasses.replace(config, layer_options={**config.layer_options, **options})


def _in_order(kinds, models, lengths) -> list[tuple]:
  """Training steps, then model by model what else there is: that shares the parameters."""
  training = [kind for kind in kinds if kind == 'train']
  others = [kind for kind in kinds if kind != 'train']
  found = list(itertools.product(training, models, lengths))
  for model in models:
    found += itertools.product(others, [model], lengths)
  return found


def _groups(plan: list[tuple]) -> Iterator[list[tuple]]:
  """Parts of the plan that are compiled side by side; parameters are those of one model.

  Prompts of attention come one by one: they are read once before they are timed, and cuDNN cannot
  be loaded while another thread captures a CUDA graph.
  """

  def shared(entry):
    identity = entry[0]
    if identity['kind'] == 'prefill' and 'attention' in identity['mixer']:
      return identity['model'], identity['length']
    return None if identity['kind'] == 'train' else identity['model']

  for _, entries in itertools.groupby(plan, shared):
    while group := list(itertools.islice(entries, COMPILERS)):
      yield group


def _prepare(model, count, length, kind, config, chunk) -> Callable[[], Timing]:
  """What measures; its programs are compiled."""
  if kind == 'train':
    return prepare_training(model, config, count, length)
  if kind == 'prefill':
    return prepare_prefill(model, count, length, chunk)
  return prepare_decode(model, count, length)


def prepare_training(
  model: LanguageModel, config: ConfigDict, count: int, length: int
) -> Callable[[], Timing]:
  """Compiles an optimiser step on `count` sequences; what is returned runs and times it."""
  config = config.copy_and_resolve_references()
  config.accumulate = 1
  optimizer = make_optimizer(config)
  init, key = initializer(model, optimizer), jax.random.key(0)
  tokens = _tokens(model, count, length + 1)
  batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:]}
  model = LanguageModel(with_fused_attention(model.config))

  def loss_sums(params, batch):  # a sequence is one document, so attention needs no mask
    return model.apply({'params': params}, batch['tokens'], batch['targets'], method='loss')

  step = functools.partial(train_step, loss_sums=loss_sums, optimizer=optimizer, config=config)
  compiled = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(init, key), batch).compile()
  init = jax.jit(init).lower(key).compile()

  def run() -> Timing:
    state, arrays = init(key), jax.device_put(batch)

    def call():
      nonlocal state
      state, _ = compiled(state, arrays)
      return state.step

    return Timing(_median(call), count * length, _memory(compiled))

  return run


def prepare_prefill(
  model: LanguageModel, count: int, length: int, chunk: int
) -> Callable[[], Timing]:
  """Likewise of the reading of `count` prompts, chunk by chunk, the state carried.

  FlashAttention reads them in one piece and keeps nothing: with a cache it is XLA's products, whose
  logits of a chunk alone may not fit.
  """
  params, prompts = _params(model), _tokens(model, count, length)
  fused = LanguageModel(with_fused_attention(model.config))

  def call():
    if 'attention' in model.config.pattern and fused != model:
      return _read_at_once(fused, params, prompts)
    return generation.prefill(model, params, prompts, BLOCK, chunk=chunk)[0]

  jax.block_until_ready(call())
  held = _held(model, params, count, length)
  return lambda: Timing(_median(call), count * length, held)


@functools.partial(jax.jit, static_argnums=0)
def _read_at_once(model, params, tokens_BT):
  return model.apply({'params': params}, tokens_BT, None, None, method='next_logits')[0]


def prepare_decode(model: LanguageModel, count: int, length: int) -> Callable[[], Timing]:
  """Likewise of a block of tokens of `count` sequences, behind `length` tokens.

  The cache has room for them and is empty: attention's products go over all of it.
  """
  params, room = _params(model), length + DECODED + BLOCK
  held = _held(model, params, count, room)

  def times(blocks):
    cache = model.init_cache(count, room)
    logits_BS = jnp.zeros((count, model.config.vocab_size), jnp.float32)
    state = generation.Decoding(logits_BS, cache, jnp.int32(0), jnp.zeros(count, bool))
    for _ in range(blocks):
      begin = time.perf_counter()
      tokens_BN, state = generation.decode(
        model, params, state, jax.random.key(0), jnp.float32(0), None, greedy=True, top_k=None,
        stop_token=None, steps=BLOCK,
      )  # fmt: skip
      jax.block_until_ready(tokens_BN)
      yield time.perf_counter() - begin

  list(times(1))
  return lambda: Timing(statistics.median(times(DECODED // BLOCK)), count * BLOCK, held)


def _held(model: LanguageModel, params, count: int, length: int) -> int:
  cache = jax.eval_shape(lambda: model.init_cache(count, length))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, cache)))


def _attempt(function: Callable):
  """What the function returns; None where memory runs out."""
  try:
    return function()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error) and 'out of memory' not in str(error).lower():
      raise
    return None


def _median(call: Callable[[], jax.Array]) -> float:
  jax.block_until_ready(call())
  times: list[float] = []
  while len(times) < min(REPETITIONS, 2) or (len(times) < REPETITIONS and sum(times) < ENOUGH):
    begin = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - begin)
  return statistics.median(times)


def _memory(compiled) -> int | None:
  found = compiled.memory_analysis()
  if found is None:
    return None
  arguments = found.argument_size_in_bytes + found.output_size_in_bytes
  return arguments - found.alias_size_in_bytes + found.temp_size_in_bytes


def _params(model: LanguageModel):
  with _LOCK:  # or threads that ask for the same would each make it
    return _made_params(model)


_LOCK = threading.Lock()


@functools.lru_cache(maxsize=1)
def _made_params(model: LanguageModel):
  one = jnp.zeros((1, 1), jnp.int32)
  return jax.jit(lambda key: model.init(key, one)['params'])(jax.random.key(0))


def _tokens(model: LanguageModel, count: int, length: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return rng.integers(0, model.config.vocab_size, (count, length)).astype(np.int32)


def _digest(config: ModelConfig) -> str:
  return f'sha256:{hashlib.sha256(repr(config).encode()).hexdigest()[:8]}'


def draw(folder: pathlib.Path, kinds: Sequence[str], rows: Sequence[dict]) -> None:
  """Draws throughput_KIND.png and memory_KIND.png of what fits, for each of the kinds."""
  figures_of = {
    'throughput': ('tokens_per_second', 1, 'tokens a second'),
    'memory': ('memory_bytes', 2**30, 'GiB'),
  }
  for kind, (name, (column, unit, label)) in itertools.product(kinds, figures_of.items()):
    lines: dict[str, tuple[list, list]] = {}
    for row in sorted(rows, key=lambda row: row['length']):
      if row['kind'] == kind and row[column] is not None:
        x, y = lines.setdefault(row['mixer'], ([], []))
        x.append(row['length'])
        y.append(row[column] / unit)
    if lines:
      path = folder / f'{name}_{kind}.png'
      figures.curves(path, lines, 'length (tokens)', f'{kind}: {label}', log_y=True)
