"""The oracle's gradient against complex steps of its recurrence, and a case worked out by hand."""

import numpy as np
import pytest

from tests import oracle


def _call(rng, update, readout, clip, channel, residual):
  B, T, G, H, K, V = 2, 9, 2, 4, 3, 5
  gate = rng.uniform(0.1, 1.5, (2, B, T, H))
  return oracle.Call(
    q=rng.normal(size=(B, T, G, K)),
    k=rng.normal(size=(B, T, G, K)) / np.sqrt(K),
    v=rng.normal(size=(B, T, H, V)),
    log_decay=-rng.exponential(0.5, (B, T, H, K) if channel else (B, T, H)),
    beta=gate[0],
    gamma=gate[1] if residual else None,
    base=rng.normal(size=(B, H, K, V)),
    residual=rng.normal(size=(B, H, K, V)) if residual else None,
    segment_ids=np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [3, 3, 5, 4, 4, 4, 4, 4, 4]]),
    update=update,
    clip=clip,
    readout=readout,
  )


@pytest.mark.parametrize('update', ['additive', 'delta'])
@pytest.mark.parametrize(
  ('residual', 'readout', 'clip', 'channel'),
  [
    (True, 'gated', 1.0, False),
    (True, 'gated', None, True),
    (True, 'sum', 0.7, True),
    (True, 'sum', 1.0, False),
    (False, 'gated', 1.0, True),
    (False, 'gated', 1.0, False),
  ],
)
def test_gradient_is_that_of_the_recurrence(update, residual, readout, clip, channel):
  rng = np.random.default_rng(0)
  call = _call(rng, update, readout, clip, channel, residual)
  cotangents = {name: rng.normal(size=x.shape) for name, x in oracle.recurrence(call).items()}
  found = oracle.gradients(call, cotangents)
  assert set(found) == set(call.arrays())
  for name, x in call.arrays().items():
    direction = rng.normal(size=x.shape)
    moved = oracle.recurrence(call.replace(**{name: x + 1e-30j * direction}))
    slope = sum((cotangents[n] * moved[n].imag).sum() for n in oracle.OUTPUTS if n in moved) / 1e-30
    np.testing.assert_allclose((found[name] * direction).sum(), slope, rtol=1e-12, err_msg=name)


def test_the_clip_mask_can_be_pinned():
  rng = np.random.default_rng(1)
  call = _call(rng, 'delta', 'gated', 1.0, False, True)
  cotangents = {'o': rng.normal(size=call.v.shape)}
  inside = np.abs(oracle.recurrence(call)['innovation']) < 1
  assert 0.2 < inside.mean() < 0.8
  free, same = (oracle.gradients(call, cotangents, mask) for mask in (None, inside))
  other = oracle.gradients(call, cotangents, ~inside)
  for name in free:
    np.testing.assert_array_equal(free[name], same[name])
  assert not np.allclose(free['v'], other['v'])


def test_two_tokens_by_hand():
  """One key of length one, one value: S and R are numbers."""

  def column(*x):
    return np.array(x, float).reshape(1, len(x), 1, 1)

  call = oracle.Call(
    q=column(1, 2), k=column(1, 1), v=column(4, 3), log_decay=np.log(column(1, 0.5)[..., 0]),
    beta=column(0.5, 0.5)[..., 0], gamma=column(1, 0.25)[..., 0],
  )  # fmt: skip
  # Token 1: r = clip(4) = 1, S = 2, R = 1, o = 0 + 1 * 1 * 1.
  # Token 2: r = clip(3 - 2) = 1. Decayed: S = 1, R = 0.5. Then S = 1 - 0.5 + 1.5,
  # R = 0.5 - 0.125 + 0.25, o = 2 * 1 + 0.25 * 2 * 0.625.
  out = oracle.recurrence(call)
  np.testing.assert_allclose(out['o'].ravel(), [1, 2.3125], rtol=1e-15)
  np.testing.assert_allclose([out['base'].item(), out['residual'].item()], [2, 0.625], rtol=1e-15)
  # Additive: S = 1 + 1.5, R = 0.5 + 0.25, o = 2 * 1 + 0.25 * 2 * 0.75.
  out = oracle.recurrence(call.replace(update='additive'))
  np.testing.assert_allclose(out['o'].ravel(), [1, 2.375], rtol=1e-15)
  np.testing.assert_allclose([out['base'].item(), out['residual'].item()], [2.5, 0.75], rtol=1e-15)
