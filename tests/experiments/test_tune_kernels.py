"""Tuning chooses what is faster by more than noise and right, and goes on from its log."""

import dataclasses
import importlib
import itertools
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

from rla_jax.kernels.residual.gpu import blocks  # noqa: E402
from rla_jax.kernels.residual.gpu.blocks import Kernel  # noqa: E402

GIB = 2**30


@pytest.fixture
def card(monkeypatch):
  """A card that answers at once; `times` and `peaks` say what is not 1 ms and 1 GiB, by launch."""
  module = importlib.import_module('tune_kernels')
  flags.FLAGS.mark_as_parsed()
  fake = types.SimpleNamespace(
    module=module, times={}, peaks={}, wrong=set(), fails=set(), built=[]
  )

  def build(problem, chosen):
    fake.built.append(chosen)
    if chosen in fake.fails:
      raise ValueError('out of shared memory')
    return types.SimpleNamespace(once=chosen)

  def measure(prepared, inputs, repeats):
    return types.SimpleNamespace(seconds=fake.times.get(prepared.once, 1.0) * 1e-3)

  monkeypatch.setattr(module, 'build', build)
  monkeypatch.setattr(module, 'arguments', lambda problem: (None,) * 8)
  monkeypatch.setattr(module, 'is_hopper', lambda: True)
  monkeypatch.setattr(module, 'is_right', lambda problem, c: c not in fake.wrong)
  monkeypatch.setattr(module.timing, 'measure', measure)
  monkeypatch.setattr(module.timing, 'peak_bytes', lambda c: fake.peaks.get(c, GIB))
  return fake


def tune(card, problem, path, parts, versions='these'):
  """What is put into the table last; None for no entry, '' if nothing is said of it."""
  saved = ['""']
  with flagsaver.flagsaver(parts=parts):
    log = card.module.Log(path, versions)
    card.module.tune(problem, log, float('inf'), lambda _, record: saved.append(json.dumps(record)))
  record = json.loads(saved[-1])
  return blocks.Blocks.from_json(record) if record else record


def with_keys(*launch):
  return dataclasses.replace(START, keys=Kernel(*launch))


RDN = Problem('rdn', 'forward_backward', 16, 2048, 16, 128)
FEW = dataclasses.replace(RDN, batch=4, length=8192)
START = blocks.heuristic(
  delta=True, residual=True, key_dim=128, value_dim=128, dtype='bfloat16', heads=256, length=2048
)


def test_faster_by_more_than_noise_and_right_is_chosen(card, tmp_path):
  fastest, right, noise = (with_keys(*x) for x in ((16, 4, 4), (32, 4, 2), (16, 4, 2)))
  card.times = {fastest: 0.90, right: 0.95, noise: 0.985}
  card.wrong = {fastest}
  card.fails = {with_keys(64, 4, 2)}
  log = tmp_path / 'log'
  assert tune(card, RDN, log, ['keys']) == right
  del card.times[right]
  assert tune(card, RDN, tmp_path / 'other', ['keys']) is None
  text = log.read_text()
  assert 'ValueError: out of shared memory' in text and '"right": false' in text


def test_nothing_right_is_no_entry(card, tmp_path):
  card.wrong = {START, *(with_keys(*x) for x in itertools.product((16, 32, 64), (4,), (2, 3, 4)))}
  assert tune(card, RDN, tmp_path / 'log', ['keys']) == ''


def test_a_run_goes_on_from_its_log_unless_versions_changed(card, tmp_path):
  log = tmp_path / 'log'
  tune(card, RDN, log, ['keys', 'sweep'])
  tried, card.built[:] = list(card.built), []
  assert len(set(tried)) == len(tried) > 8
  tune(card, RDN, log, ['keys', 'sweep'])
  assert card.built == []
  tune(card, RDN, log, ['keys', 'sweep'], versions='others')
  assert set(card.built) == set(tried)


def test_memory_is_not_traded_for_time_unless_asked(card, tmp_path):
  larger = dataclasses.replace(START, pieces=1)
  card.times, card.peaks = {larger: 0.5}, {larger: 1.25 * GIB}
  assert tune(card, RDN, tmp_path / 'log', ['pieces']) is None
  with flagsaver.flagsaver(memory=1.5):
    assert tune(card, RDN, tmp_path / 'log', ['pieces']) == larger
  assert tune(card, RDN, tmp_path / 'log', ['pieces']) is None


def test_what_comes_to_the_same_is_not_tried(card, tmp_path):
  """A full card walks neither in pairs nor in parts; pairs leave `forward` unused."""
  assert tune(card, RDN, tmp_path / 'log', ['pair', 'fill']) is None
  assert card.built == [START]
  card.built.clear()
  assert tune(card, FEW, tmp_path / 'log', ['forward']) == ''
  tune(card, FEW, tmp_path / 'log', ['pair'])
  assert {c.pair for c in card.built} > {None, START.pair}
