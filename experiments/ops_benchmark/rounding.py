"""RDN's walk of the chunks in float64, but for what the Triton kernels round.

States are rounded to bfloat16 where they are read, the errors that the inverse is applied to and
what is written in one part or with what that leaves in a second, the inverse, the prediction's
matrix, and the residual as where states have programs of their own (`pair`). For state_rounding.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ops_benchmark.problem import Problem, make_inputs

COLUMNS = [f'{state}_{x}' for state in ('base', 'residual') for x in ('mean', 'largest')]
CHUNK, SHARE = 32, 0.9
LEAST, MOST = 0.05, 2**-8  # as in kernels.residual.gpu.prepare
# How the inverse is stored ('': exactly), and whether errors have one part (else two).
VARIANTS = {
  'all': ('kept', True), 'free': ('free', True), 'parts': ('kept', False),
  'free parts': ('free', False), 'exact inverse': ('', False),
}  # fmt: skip


def low(x, dtype=jnp.bfloat16):
  """Rounded to 16 bits."""
  return x.astype(dtype).astype(x.dtype)


def two_parts(x):
  """Rounded, with what that leaves in 16 bits of its own."""
  return low(x) + low(x - low(x))


def draw(size: int, kinds: int, seed: int, length: int) -> dict[str, np.ndarray]:
  """Inputs [T, H, ...] and initial states [H, K, V] in float64, of values that bfloat16 has."""
  inputs = make_inputs(Problem('rdn', 'forward', 1, length, 2, size), seed)
  rng = np.random.default_rng(seed + 1)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
  common = unit(rng.standard_normal((kinds, 2, size)))[rng.integers(kinds, size=length)]
  inputs['k'] = unit((1 - SHARE) * inputs['k'] + SHARE * common)
  found = {n: x[0].astype(np.float64) for n, x in inputs.items()}
  found |= {n: np.asarray(low(jnp.asarray(found[n]))) for n in 'kv'}
  found['base'], found['residual'] = 0.1 * rng.standard_normal((2, 2, size, size))
  return found


def inverse(N):
  """(I + N)^-1 of a strictly lower triangular N [H, C, C], row by row."""
  identity = jnp.broadcast_to(jnp.eye(CHUNK), N.shape)
  row = lambda i, X: X.at[:, i].add(-jnp.einsum('hc,hcd->hd', N[:, i], X))  # noqa: E731
  return jax.lax.fori_loop(1, CHUNK, row, identity)


def kept(X, weights):
  """X rounded with its weighted sums down the columns as they were: `store_inverse`."""
  gain = jnp.einsum('hi,hij->hj', weights, low(X) - X)
  squares = weights**2
  change = jnp.clip(-gain / (jnp.cumsum(squares, -1) - squares + LEAST), -MOST, MOST)
  return low(jnp.triu(weights[:, :, None] * change[:, None], 1) + low(X))


@functools.partial(jax.jit, static_argnames='variant')
def walk(inputs: dict, variant: str | None = None) -> tuple[jax.Array, jax.Array]:
  """Final states by the recurrence's equations (6) to (10), in one of VARIANTS or exactly."""
  stored, is_one_part = VARIANTS[variant] if variant else ('', False)
  rounded = low if variant else lambda x: x
  both = two_parts if variant else lambda x: x
  errors = low if is_one_part else both

  def solved(A, exact, gate, to_end):
    X = inverse(A * gate[:, None])
    X = {'': lambda: X, 'free': lambda: low(X), 'kept': lambda: kept(X, to_end * gate)}[stored]()
    return X @ errors(exact)

  def chunk(states, x):
    S, R = states
    k, v, beta, gamma = x['k'], x['v'], x['beta'], x['gamma']
    G = jnp.cumsum(x['log_decay'], -1)
    before = G - x['log_decay']
    gram = jnp.einsum('hik,hjk->hij', k, k)
    A = jnp.tril(jnp.exp(jnp.minimum(G[:, :, None] - G[:, None], 0)) * gram, -1)
    P = jnp.tril(jnp.exp(jnp.minimum(before[:, :, None] - G[:, None], 0)) * gram, -1)
    into, to_end, all_ = jnp.exp(G), jnp.exp(G[:, -1:] - G), jnp.exp(G[:, -1])[:, None, None]

    def write(M, F, gate):
      return all_ * M + jnp.einsum('hck,hcv->hkv', k, both((to_end * gate)[..., None] * F))

    X = k @ rounded(S)
    exact = v - into[..., None] * X
    prediction = rounded(jnp.einsum('hij,hj,hjl->hil', P, beta, inverse(A * beta[:, None])))
    r = v - jnp.exp(before)[..., None] * X - prediction @ rounded(exact)
    r = jnp.clip(r, -1, 1)
    r = low(r, jnp.float16) if variant else r
    S = write(S, solved(A, exact, beta, to_end), beta)
    exact = r - into[..., None] * (k @ rounded(R))
    R = write(R, solved(A, exact, gamma, to_end), gamma)
    return (S, R), None

  tokens = {n: jnp.asarray(inputs[n]) for n in ('k', 'v', 'log_decay', 'beta', 'gamma')}
  tokens = {n: jnp.swapaxes(x.reshape(-1, CHUNK, *x.shape[1:]), 1, 2) for n, x in tokens.items()}
  return jax.lax.scan(chunk, (inputs['base'], inputs['residual']), tokens)[0]


def errors_of(size: int, kinds: int, seed: int, length: int) -> dict[str, np.ndarray]:
  """Relative errors of both states by variant."""
  with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
    inputs = draw(size, kinds, seed, length)
    exact = jax.tree.map(np.asarray, walk(inputs))
    return {
      variant: np.array([
        np.sqrt(np.mean((np.asarray(x) - y) ** 2) / np.mean(y**2))
        for x, y in zip(walk(inputs, variant), exact, strict=True)
      ])
      for variant in VARIANTS
    }  # fmt: skip
