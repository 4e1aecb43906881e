"""The self-test of the Triton kernels: it covers what is in use, and knows right from wrong."""

import dataclasses
import itertools

import jax
import pytest

pytest.importorskip('triton')

from rla_jax.kernels.residual import judge
from rla_jax.kernels.residual.gpu import blocks, call, candidates, selftest
from rla_jax.kernels.residual.gpu.handover import HANDED_AT_A_TIME
from tests.kernels.triton_harness import small_blocks

RULES = set(itertools.product((True, False), repeat=2))  # delta, residual


def _small_case():
  return selftest.Case(True, True, 'float32', 16, 16, small_blocks(), 'test')


def test_self_test_passes_right_kernels(capsys):
  shares = selftest.check(_small_case(), length=29, interpret=True)
  assert set(shares) == {'o', 'base', 'residual', *(f'd{n}' for n in judge.INPUTS)}
  assert selftest.report('right', shares)
  assert selftest.report('decode', selftest.check_step('bfloat16', 16, interpret=True))
  assert capsys.readouterr().out.count('ok') == 2


@pytest.mark.parametrize('wrong', ['v', 'beta'])
def test_self_test_finds_wrong_gradients(monkeypatch, capsys, wrong):
  """One part in a thousand of one gradient is enough."""
  attend = call.attend

  @jax.custom_vjp
  def off(x):
    return x

  off.defvjp(lambda x: (x, None), lambda _, dx: (1.001 * dx,))

  def miscompiled(config, q, k, v, log_decay, beta, *rest):
    v, beta = (off(v), beta) if wrong == 'v' else (v, off(beta))
    return attend(config, q, k, v, log_decay, beta, *rest)

  monkeypatch.setattr(selftest.call, 'attend', miscompiled)
  assert not selftest.report('x', selftest.check(_small_case(), length=16, interpret=True))
  assert f'WRONG x: worst d{wrong}' in capsys.readouterr().out


def test_self_test_covers_heuristic_and_table(monkeypatch):
  cases = selftest.heuristic_cases([64, 128], ['bfloat16'])
  assert len(set(cases)) == len(cases)
  assert {(c.delta, c.residual) for c in cases} == RULES
  assert {(c.delta, c.residual) for c in cases if c.blocks.split} == RULES
  pairs = [c for c in cases if c.blocks.pair]
  assert {c.key_dim for c in pairs} == {64, 128}
  large = selftest.heuristic_cases([256], ['bfloat16'])
  for case in (c for c in pairs + large if c.blocks.walk == 'pair'):
    assert min(selftest.lengths(case.blocks)) > 2 * HANDED_AT_A_TIME * case.blocks.chunk
  walks = {(c.delta, c.blocks.walk, c.blocks.split) for c in large if c.residual}
  whole, parts = (('pair', None), ('apart', None)), (('apart', 4),)
  assert walks == {(delta, *walk) for delta in (True, False) for walk in whole + parts}
  sizes = {'key_dim': 64, 'value_dim': 32, 'dtype': 'float16'}
  key = blocks.tuned_key(delta=True, residual=False, heads=300, length=5000, **sizes)
  table = {key: dataclasses.asdict(small_blocks())}
  monkeypatch.setattr(blocks, 'tuned_table', lambda kind: table)
  (case,) = selftest.tuned_cases('NVIDIA H200')
  unsplit = dataclasses.replace(small_blocks(), fill=0, walk='both')
  assert case == selftest.Case(True, False, 'float16', 64, 32, unsplit, 'any')


def test_the_table_says_what_the_heuristic_does_not():
  """An entry that repeats it would only hide its next change."""
  entries = blocks.tuned_table('NVIDIA H200')
  assert entries
  for key in entries:
    asked = blocks.parsed_key(key)
    assert blocks.tuned_key(**asked) == key
    call_ = {n: asked[n] for n in ('value_dim', 'heads', 'length')}
    records = blocks.choose('NVIDIA H200', **asked), blocks.heuristic(**asked)
    assert len({selftest.settled(record, **call_) for record in records}) == 2, key


def test_parts_are_those_of_the_call():
  """16 heads of 128, 32768 tokens, in 4 pieces; a narrow tile makes programs enough."""
  call_ = {'value_dim': 128, 'heads': 16, 'length': 32768}
  chosen = blocks.heuristic(
    delta=True, residual=True, key_dim=128, dtype='bfloat16', **call_
  )
  assert selftest.parts(chosen, **call_) == (8, 8)
  assert selftest.settled(chosen, **call_).split == 8
  assert selftest.settled(chosen, **call_).walk == 'apart'
  narrow = dataclasses.replace(chosen, pair=blocks.Kernel(16, 1, 3))
  assert selftest.parts(narrow, **call_) == (1, 8)
  assert selftest.settled(narrow, **call_).split == 8
  assert selftest.settled(narrow, **call_).walk == 'pair'
  fixed = dataclasses.replace(chosen, split=5)
  assert selftest.parts(fixed, **call_) == (5, 5)
  assert selftest.settled(fixed, **call_).split == 5


def test_self_test_covers_candidates():
  for size in (256, 128):
    cases = selftest.candidate_cases([size], ['bfloat16'])
    assert set(selftest.heuristic_cases([size], ['bfloat16'])) < set(cases)
    for part in ('queries', 'keys', 'sweep'):
      for launch_ in candidates.PROMISING[part]:
        tried = [c for c in cases if dataclasses.astuple(getattr(c.blocks, part)) == launch_]
        assert {(c.delta, c.residual) for c in tried} == RULES
  pairs = {dataclasses.astuple(c.blocks.pair) for c in cases if c.blocks.pair}
  assert pairs == set(candidates.PROMISING['pair'])


def test_self_test_skips_what_tuning_would_try_and_does_not_fit():
  error = RuntimeError(
    'INTERNAL: CustomCall failed: Shared memory requested (239500 b) exceeds device resources '
    '(232448 b).'
  )
  assert not selftest.finding(error, is_tried=True)[1]
  assert selftest.finding(error, is_tried=False)[1]
  assert selftest.finding(ValueError(), is_tried=True) == ('ValueError', True)
  tried = {c.source.split()[0]: c.is_tried for c in selftest.candidate_cases([64], ['bfloat16'])}
  assert not tried.pop('heuristic')
  assert tried and all(tried.values())
