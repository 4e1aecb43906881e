"""How far arrays are apart: the one measure of all tests."""

import numpy as np

TINY = 1e-30


def error(got, want) -> float:
  """RMS(got - want) / RMS(want); NaN, which is below no bar, where a number is NaN.

  A reference below TINY counts as TINY: float32 holds nothing smaller, so a gradient that has
  decayed to 1e-160 may be given as zero.
  """
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  assert got.shape == want.shape, f'shape {got.shape}; expected {want.shape}'
  if not want.size:
    return 0.0
  return rms(got - want) / max(rms(want), TINY)


def rms(x: np.ndarray) -> float:
  """Root of the mean square, without overflow or underflow."""
  largest = np.abs(x).max(initial=0)
  return float(largest * np.sqrt(np.mean((x / largest) ** 2))) if largest else 0.0


def cosine(got, want) -> float:
  """Cosine of the angle between two gradients."""
  x, y = (np.ravel(np.asarray(x, np.float64)) for x in (got, want))
  return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
