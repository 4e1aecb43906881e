"""Holds the kernels against float64 on the card at hand; part of `residual.gpu.selftest`."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rla_jax.kernels.short_conv import gpu

B, T, H, W = 2, 100, 3, 4


@dataclasses.dataclass(frozen=True)
class Case:
  """What is compiled. `packed`: with documents, a tail from an earlier call, and a shield."""

  dtype: str
  size: int
  norm: bool
  packed: bool

  def __str__(self):
    words = ('norm' if self.norm else 'no norm') + (', documents' if self.packed else '')
    return f'short convolution  {self.dtype:8} size {self.size:3} {words}'


def cases(sizes, dtypes) -> list[Case]:
  """As queries, keys and values are computed."""
  return [Case(*case) for case in itertools.product(dtypes, sizes, (True, False), (True, False))]


def check(case: Case, *, seed: int = 0, interpret: bool = False) -> dict[str, float]:
  """Errors by name, RMS(error) / RMS(reference)."""
  rng = np.random.default_rng(seed)
  dtype, X = jnp.dtype(case.dtype), H * case.size
  h, tail = (rng.standard_normal((B, n, X)).astype(dtype) for n in (T, W - 1))
  taps = rng.uniform(-1, 1, (W, X)).astype(np.float32)
  dy = rng.standard_normal((B, T, H, case.size)).astype(dtype)
  documents, tail = (_documents(rng), tail) if case.packed else (None, None)
  scale = case.size**-0.5 if case.norm else 1.0

  def kernel(h, taps, tail):
    found = gpu.short_conv(
      h, taps, tail, documents, size=case.size, activation='silu', norm=case.norm, scale=scale,
      shield=case.packed, interpret=interpret,
    )  # fmt: skip
    return found[0] if case.packed else found

  def definition(h, taps, tail):
    return _definition(case, scale, h, taps, tail, documents)

  arguments = (h, taps, tail)
  actual = jax.jit(lambda *x: _all(kernel, *x))(arguments, dy)
  with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (arguments, dy))
    wanted = jax.jit(lambda *x: _all(definition, *x))(*wide)
  names = ('y', 'dh', 'dtaps', 'dtail')
  return {n: _error(x, y) for n, x, y in zip(names, actual, wanted, strict=True) if y is not None}


def _documents(rng):
  """Many short ones, then a long one: tiles of one document and of several."""
  starts = rng.random((B, T)) < 0.2
  starts[:, 0] = starts[:, T // 3 :] = False
  return np.cumsum(starts, axis=1).astype(np.int32)


def _definition(case, scale, h, taps, tail, documents):
  padding = jnp.zeros((B, W - 1, h.shape[2])) if tail is None else tail
  inputs = jnp.concatenate([padding, h], axis=1)
  z = jnp.zeros_like(h)
  for tap in range(W):
    x = inputs[:, tap : tap + T]
    if documents is not None:
      own = np.pad(documents, ((0, 0), (W - 1, 0)))[:, tap : tap + T] == documents
      x = jnp.where(own[..., None], x, 0)
    z += taps[tap][None, None] * x
  a = jax.nn.silu(z).reshape(B, T, H, case.size)
  if case.norm:
    a /= jnp.sqrt(jnp.sum(a * a, axis=-1, keepdims=True) + 1e-6)
  return scale * a


def _all(function, arguments, dy):
  y, pull = jax.vjp(function, *arguments)
  return y, *pull(dy)


def _error(x, y):
  x, y = (np.asarray(z, np.float64) for z in (x, y))
  error = np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))
  return float(error) if np.isfinite(error) else float('inf')
