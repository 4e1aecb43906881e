"""What every implementation must do. A subclass names the implementation, nothing more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import ops
from tests import oracle
from tests.ops import cases, harness

TOKENS = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma')
def _each(chosen: list[cases.Case], slow: set[str]):
  marks = {True: pytest.mark.slow, False: ()}
  parameters = [pytest.param(c, marks=marks[c.name in slow], id=c.name) for c in chosen]
  return pytest.mark.parametrize('case', parameters)


updates = pytest.mark.parametrize('update', cases.UPDATES)


class OperatorSuite:
  """Set `implementation`. An implementation that refuses a case fails it."""

  implementation: str

  @updates
  @_each(cases.CASES, cases.SLOW)
  def test_float32(self, case, update):
    call = case.call(update)
    cotangents = cases.cotangents(call)
    got = harness.measured(call, cotangents, self.implementation)
    harness.assert_within(got, harness.expected(call, cotangents), harness.BARS['float32'])

  @updates
  @_each(cases.LOW_PRECISION, cases.SLOW_LOW_PRECISION)
  def test_bfloat16(self, case, update):
    call = case.call(update, 'bfloat16')
    cotangents = cases.cotangents(call)
    got = harness.measured(call, cotangents, self.implementation)
    want = harness.expected(call, cotangents)
    harness.assert_within(got, want, harness.BARS['bfloat16'])
    for name in ('dbeta', 'dgamma', 'dlog_decay'):
      if name in want and want[name].any():
        assert harness.cosine(got[name], want[name]) >= 0.999, name

  @updates
  def test_no_tokens(self, update):
    call = cases.BY_NAME['typical'].call(update, T=0)
    cotangents = cases.cotangents(call)
    got = harness.measured(call, cotangents, self.implementation)
    harness.assert_within(got, harness.expected(call, cotangents), harness.BARS['float32'])

  @updates
  def test_no_tokens_in_segments(self, update):
    call = cases.BY_NAME['typical'].call(update, T=0)
    call = call.replace(segment_ids=np.zeros((2, 0), np.int32))
    got = harness.measured(call, cases.cotangents(call), self.implementation)
    np.testing.assert_array_equal(got['base'], call.base)

  @updates
  @pytest.mark.parametrize('bad', [np.nan, np.inf])
  @pytest.mark.parametrize('where', TOKENS)
  def test_broken_document_stays_alone(self, update, where, bad):
    """Values and gradients of clean documents equal separate runs; the broken one is NaN."""
    call = cases.BY_NAME['segments'].call(update)
    cotangents = cases.cotangents(call)
    # Tokens 15 to 63 of row 0 are one document. All of it is to be NaN in the gradient, and its
    # outputs from the bad token on.
    array = getattr(call, where).copy()
    array[0, 30] = bad
    broken = call.replace(**{where: array})
    got = harness.measured(broken, cotangents, self.implementation)
    want = harness.measured(call, cotangents, self.implementation)
    for name, x in got.items():
      keep = np.ones(x.shape, bool)
      if name == 'o':
        keep[0, 30:64] = False
      elif name not in ('base', 'residual', 'dbase', 'dresidual'):
        keep[0, 15:64] = False
      assert np.isnan(x[~keep]).all(), f'{name} of the broken document is not NaN'
      assert harness.error(x[keep], want[name][keep]) < 1e-5, name

  @updates
  def test_documents_equal_separate_calls(self, update):
    """Five documents of 15 tokens; the first continues a state, the last hands its own on."""
    call = cases.BY_NAME['segments'].call(update)
    length, rows = 15, cases.SIZES['T'] // 15
    ids = np.repeat(np.arange(rows, dtype=np.int32), length)
    call = call.replace(segment_ids=np.stack([ids, ids[::-1]]))
    cotangents = cases.cotangents(call)
    packed = harness.measured(call, cotangents, self.implementation)
    alone = call.replace(segment_ids=None)
    for row in range(rows):
      first, last = row == 0, row == rows - 1
      tokens = slice(row * length, (row + 1) * length)
      pieces = {n: x[:, tokens] if n in TOKENS else x * first for n, x in call.arrays().items()}
      into = {n: x[:, tokens] if n == 'o' else x * last for n, x in cotangents.items()}
      one = harness.measured(alone.replace(**pieces), into, self.implementation)
      for name, x in one.items():
        if name in ('o', *(f'd{n}' for n in TOKENS)):
          assert harness.error(packed[name][:, tokens], x) < 1e-5, (name, row)
        elif (name.startswith('d') and first) or (not name.startswith('d') and last):
          assert harness.error(packed[name], x) < 1e-5, (name, row)

  @updates
  def test_gradient_passes_the_clip_strictly_inside(self, update):
    """An innovation of exactly the bound is outside. With beta = 0, dv shows the mask itself."""
    shape = (1, 3, 1, 4)
    call = oracle.Call(
      q=np.ones(shape, np.float32) / 2, k=np.ones(shape, np.float32) / 2,
      v=np.tile(np.float32([1, -1, 0.999, 2]), (1, 3, 1, 1)),
      beta=np.zeros(shape[:3], np.float32), gamma=np.ones(shape[:3], np.float32), update=update,
    )  # fmt: skip
    got = harness.measured(call, cases.cotangents(call), self.implementation)
    assert (got['dv'][..., [0, 1, 3]] == 0).all()
    assert (got['dv'][..., 2] != 0).all()

  @updates
  def test_bfloat16_flips_few_clip_masks(self, update):
    """Without a margin, rounding may move an innovation over the clip, but only a few."""
    rng = np.random.default_rng(3)
    call = cases.rounded(cases.typical(rng, **cases.SIZES), jnp.bfloat16)
    call = call.replace(beta=np.zeros_like(call.beta), update=update)
    got = harness.measured(call, cases.cotangents(call), self.implementation)
    inside = np.abs(oracle.recurrence(call)['innovation']) < call.clip
    assert 0.2 < inside.mean() < 0.9
    assert (inside != (got['dv'] != 0)).mean() < 2e-3

  @updates
  @pytest.mark.parametrize(
    'name', ['typical', pytest.param('channel_grouped_segments_sum', marks=pytest.mark.slow)]
  )
  def test_double_precision(self, update, name):
    call = cases.BY_NAME[name].call(update)
    call = call.replace(**{n: x.astype(np.float64) for n, x in call.arrays().items()})
    cotangents = cases.cotangents(call)
    with jax.enable_x64(True):
      got = harness.measured(call, cotangents, self.implementation)
    harness.assert_within(got, harness.expected(call, cotangents), harness.BARS['float64'])

  def test_is_the_one_that_runs(self):
    x = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
    for operator in harness.OPERATORS.values():
      chosen = ops.select_implementation(operator, x, x, x, implementation=self.implementation)
      assert chosen == self.implementation
