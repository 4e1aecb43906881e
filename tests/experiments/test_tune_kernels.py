"""Tuning chooses what is faster by more than noise and right, and goes on from its log."""

import dataclasses
import importlib
import json
import pathlib
import sys
import types

import pytest

pytest.importorskip('absl')
pytest.importorskip('tqdm')
pytest.importorskip('triton')

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / 'experiments'))

from absl import flags  # noqa: E402
from absl.testing import flagsaver  # noqa: E402
from ops_benchmark.problem import Problem  # noqa: E402
from ops_benchmark.tuning_log import Log  # noqa: E402

from rla_jax.kernels.residual.gpu import blocks, candidates  # noqa: E402
from rla_jax.kernels.residual.gpu.blocks import Kernel  # noqa: E402

GIB = 2**30


@pytest.fixture
def card(monkeypatch):
  """A card that answers at once: `times` and `peaks` say what is not 1 ms and 1 GiB."""
  module = importlib.import_module('tune_kernels')
  flags.FLAGS.mark_as_parsed()
  fake = types.SimpleNamespace(
    module=module, times={}, peaks={}, wrong=set(), fails=set(), built=[], checked=[], table={}
  )

  def build(problem, chosen):
    fake.built.append(chosen)
    if chosen in fake.fails:
      raise ValueError('out of shared memory')
    return types.SimpleNamespace(once=chosen)

  def measure(prepared, inputs, repeats):
    times = fake.times.get(prepared.once, [1.0])
    return types.SimpleNamespace(seconds=(times.pop(0) if len(times) > 1 else times[0]) * 1e-3)

  def is_right(problem, chosen):
    fake.checked.append(chosen)
    return chosen not in fake.wrong

  monkeypatch.setattr(module, 'build', build)
  monkeypatch.setattr(module, 'arguments', lambda problem: (None,) * 8)
  monkeypatch.setattr(module, 'is_hopper', lambda: True)
  monkeypatch.setattr(module, 'is_right', is_right)
  monkeypatch.setattr(module.timing, 'measure', measure)
  monkeypatch.setattr(module.timing, 'peak_bytes', lambda c: fake.peaks.get(c, GIB))
  monkeypatch.setattr(blocks, 'tuned_table', lambda kind: fake.table)
  return fake


def tune(card, problem, path, parts, versions='these', end=float('inf')):
  """What a run puts into the table: a record, None for no entry, '' if it says nothing."""
  saved = ['""']
  with flagsaver.flagsaver(parts=parts):
    log = Log(path, versions)
    card.module.tune(problem, log, end, lambda _, record: saved.append(json.dumps(record)))
  assert len(saved) <= 2
  record = json.loads(saved[-1])
  return blocks.Blocks.from_json(record) if record else record


def changed(**change):
  return dataclasses.replace(START, **change)


def with_keys(*launch):
  return changed(keys=Kernel(*launch))


RDN = Problem('rdn', 'forward_backward', 16, 2048, 16, 128)
FEW = dataclasses.replace(RDN, batch=4, length=8192)
START = blocks.heuristic(
  delta=True, residual=True, key_dim=128, value_dim=128, dtype='bfloat16', heads=256, length=2048
)
KEYS = {with_keys(*x) for x in candidates.PROMISING['keys']} - {START}


def test_faster_by_more_than_noise_and_right_is_chosen(card, tmp_path):
  fastest, right, noise, *_ = sorted(KEYS, key=str)
  card.times = {fastest: [0.90], right: [0.95], noise: [0.985]}
  card.wrong = {fastest}
  card.fails = {sorted(KEYS, key=str)[3]}
  log = tmp_path / 'log'
  assert tune(card, RDN, log, ['keys']) == right
  del card.times[right]
  assert tune(card, RDN, tmp_path / 'other', ['keys']) is None
  text = log.read_text()
  assert 'ValueError: out of shared memory' in text and '"right": false' in text


def test_parts_add_up(card, tmp_path):
  keys = with_keys(16, 4, 4)
  both = dataclasses.replace(keys, sweep=Kernel(32, 2, 3))
  card.times = {keys: [0.9], both: [0.8]}
  assert tune(card, RDN, tmp_path / 'log', ['keys', 'sweep']) == both


def test_a_gain_that_is_gone_when_timed_again_is_no_entry(card, tmp_path):
  card.times = {with_keys(16, 4, 4): [0.9, 0.99]}
  assert tune(card, RDN, tmp_path / 'log', ['keys']) is None


def test_where_the_heuristic_is_wrong_what_is_right_is_chosen(card, tmp_path):
  card.wrong = {START} | {changed(queries=Kernel(*x)) for x in candidates.PROMISING['queries']}
  card.times = {START: [0.1], with_keys(16, 4, 4): [0.9]}
  assert tune(card, RDN, tmp_path / 'log', ['queries', 'keys']) == with_keys(16, 4, 4)
  card.fails, card.wrong = card.wrong, set()
  assert tune(card, RDN, tmp_path / 'other', ['queries', 'keys']) == with_keys(16, 4, 4)


def test_nothing_right_says_nothing_of_the_entry(card, tmp_path):
  card.wrong = {START} | KEYS
  assert tune(card, RDN, tmp_path / 'log', ['keys']) == ''


def test_what_is_in_use_is_where_it_starts_and_the_heuristic_is_tried(card, tmp_path):
  entry = with_keys(16, 4, 4)
  key = blocks.tuned_key(**card.module.sizes(RDN))
  card.table = {key: dataclasses.asdict(entry)}
  card.times = {entry: [0.9]}
  assert tune(card, RDN, tmp_path / 'log', ['sweep']) == entry
  assert entry in card.built and START in card.built
  card.times = {entry: [1.1]}
  assert tune(card, RDN, tmp_path / 'other', ['sweep']) is None


def test_a_start_that_fails_is_left_for_another(card, tmp_path):
  """The table's entry is in use, and no memory is known of the heuristic's."""
  entry = with_keys(16, 4, 4)
  card.table = {blocks.tuned_key(**card.module.sizes(RDN)): dataclasses.asdict(entry)}
  card.fails, card.times = {entry}, {START: [1.0]}
  assert tune(card, RDN, tmp_path / 'log', ['sweep']) is None
  assert len(card.built) > 4


def test_a_run_goes_on_from_its_log_unless_versions_changed(card, tmp_path):
  log = tmp_path / 'log'
  tune(card, RDN, log, ['keys', 'sweep'])
  tried, checked = list(card.built), list(card.checked)
  assert len(set(tried)) == len(tried) > 8 and checked == [START]
  with log.open('a') as file:
    file.write('{"problem": "rdn 16')  # killed while it wrote
  card.built.clear()
  for _ in range(2):
    tune(card, RDN, log, ['keys', 'sweep'])
  assert card.built == [] and card.checked == checked
  tune(card, RDN, log, ['keys', 'sweep'], versions='others')
  assert set(card.built) == set(tried)


def test_the_log_tells_problems_apart_that_share_an_entry(card, tmp_path):
  longer = dataclasses.replace(RDN, length=2112)
  sizes = map(card.module.sizes, (RDN, longer))
  assert len({blocks.tuned_key(**x) for x in sizes}) == 1
  tune(card, RDN, tmp_path / 'log', ['keys'])
  card.built.clear()
  tune(card, longer, tmp_path / 'log', ['keys'])
  assert len(card.built) > 4


def test_nothing_is_begun_out_of_time(card, tmp_path):
  assert tune(card, RDN, tmp_path / 'log', ['keys'], end=0) == ''
  assert card.built == []


def test_memory_is_not_traded_for_time_unless_asked(card, tmp_path):
  larger = changed(pieces=1)
  card.times, card.peaks = {larger: [0.5]}, {larger: 1.25 * GIB}
  assert tune(card, RDN, tmp_path / 'log', ['pieces']) is None
  assert '"milliseconds": 0.5' not in (tmp_path / 'log').read_text()
  with flagsaver.flagsaver(memory=1.5):
    assert tune(card, RDN, tmp_path / 'log', ['pieces']) == larger
  assert tune(card, RDN, tmp_path / 'log', ['pieces']) is None


def test_what_comes_to_the_same_is_not_tried(card, tmp_path):
  """A full card walks neither in pairs nor in parts; pairs leave `forward` unused."""
  assert tune(card, RDN, tmp_path / 'log', ['pair', 'fill']) is None
  assert card.built == [START]
  card.built.clear()
  tune(card, FEW, tmp_path / 'log', ['forward'])
  assert len(card.built) == 1
  tune(card, FEW, tmp_path / 'log', ['pair'])
  assert {c.pair for c in card.built} > {None, START.pair}


def test_starts_are_built_and_checked_once(card, tmp_path):
  log = Log(tmp_path / 'log', 'these')
  card.module.warm_up([RDN, FEW], log)
  assert len(card.built) == len(card.checked) == 2
  card.module.warm_up([RDN, FEW], Log(tmp_path / 'log', 'these'))
  assert len(card.built) == 2
  assert log.get(RDN, START) == Log(tmp_path / 'log', 'these').get(RDN, START)
  assert log.get(RDN, START)['right']
