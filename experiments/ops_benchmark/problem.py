"""What is measured: a problem, the arithmetic and traffic that it cannot do without, its inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

OPERATIONS = ('rdn', 'rla', 'gdn', 'simple_gla', 'flash')
CHUNK = 64  # the count of operations is that of the chunk form with chunks of 64 tokens


@dataclasses.dataclass(frozen=True)
class Problem:
  """One size of one operation.

  Attributes:
    operation: 'rdn', 'rla', 'gdn', 'simple_gla' or 'flash' (causal softmax attention).
    direction: 'forward', 'forward_backward' or 'decode'.
    batch: sequences.
    length: tokens of a sequence; 1 for decode.
    heads: query, key and value heads.
    size: key and value size of a head.
    dtype: of q, k, v and o.
  """

  operation: str
  direction: str
  batch: int
  length: int
  heads: int
  size: int
  dtype: str = 'bfloat16'

  @property
  def is_delta(self) -> bool:
    """The update is the delta rule."""
    return self.operation in ('rdn', 'gdn')

  @property
  def has_residual(self) -> bool:
    """There is a second state."""
    return self.operation in ('rdn', 'rla')

  @property
  def qkvo_bytes(self) -> int:
    """Bytes of one of q, k, v and o."""
    itemsize = jnp.dtype(self.dtype).itemsize
    return self.batch * self.length * self.heads * self.size * itemsize

  def flops(self) -> float:
    """Matrix arithmetic of the mathematics alone: nothing is computed twice."""
    if self.direction == 'decode':
      return 0.0
    if self.operation == 'flash':
      square = self.batch * self.heads * self.length**2 * self.size  # causal: half of 4 T T D / 2
      return 2.0 * square * (3.5 if self.direction == 'forward_backward' else 1)
    # (C C K, C C V, C K V) products of a chunk, forward and adjoint: derivation, (6) to (10).
    forward, adjoint = {
      'rdn': ((2, 5, 6), (3, 10, 12)),
      'rla': ((2, 3, 5), (3, 6, 11)),
      'gdn': ((2, 2, 3), (3, 4, 6)),
      'simple_gla': ((1, 1, 2), (2, 2, 4)),
    }[self.operation]
    counts = np.array(forward)
    if self.direction == 'forward_backward':
      counts = counts + np.array(adjoint)
    chunks = self.batch * self.heads * self.length / CHUNK
    products = np.array([CHUNK * CHUNK * self.size] * 2 + [CHUNK * self.size * self.size])
    return 2.0 * chunks * float(counts @ products)

  def bytes(self) -> float:
    """Traffic that cannot be avoided: every input read and every output written once."""
    if self.direction == 'decode':
      states = 1 + self.has_residual
      return 2.0 * states * 4 * self.batch * self.heads * self.size**2
    tensors = 4 if self.direction == 'forward' else 11  # backward: q k v do in, dq dk dv out
    return float(tensors * self.qkvo_bytes)

  def floor_seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
    """The longer of moving the bytes and doing the arithmetic at the card's measured rates."""
    return max(self.bytes() / bytes_per_second, self.flops() / flops_per_second)


def make_inputs(problem: Problem, seed: int, correlation: float = 0.0) -> dict[str, np.ndarray]:
  """Random inputs in float32: normalised q and k, decays near 0.98, gates in (0, 1).

  Args:
    problem: its sizes.
    seed: of the generator.
    correlation: share of one common direction in all keys, from 0 to 1: repeated tokens.
  """
  rng = np.random.default_rng(seed)
  shape = (problem.batch, problem.length, problem.heads, problem.size)

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  def normal(*shape):
    return rng.standard_normal(shape, dtype=np.float32)

  q, k, v = unit(normal(*shape)), unit(normal(*shape)), normal(*shape)
  if correlation:
    common = unit(normal(problem.batch, 1, problem.heads, problem.size))
    k = unit((1 - correlation) * k + correlation * common)
  beta, gamma = rng.random((2, *shape[:3]), dtype=np.float32)
  log_decay = -np.logaddexp(0, -(normal(*shape[:3]) + 4)).astype(np.float32)
  return {'q': q, 'k': k, 'v': v, 'log_decay': log_decay, 'beta': beta, 'gamma': gamma}


def on_device(problem: Problem, seed: int) -> dict[str, jax.Array]:
  """The same distribution, drawn on the device: large inputs are slow to draw on the host."""
  shape = (problem.batch, problem.length, problem.heads, problem.size)
  return _draw(jax.random.key(seed), shape, problem.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))  # compiled once for all problems of a size
def _draw(key, shape, dtype):
  keys = jax.random.split(key, 6)
  q, k, v = (jax.random.normal(key, shape, jnp.float32) for key in keys[:3])
  q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  beta, gamma = (jax.random.uniform(key, shape[:3]) for key in keys[3:5])
  log_decay = jax.nn.log_sigmoid(jax.random.normal(keys[5], shape[:3]) + 4)
  q, k, v = (x.astype(dtype) for x in (q, k, v))
  return {'q': q, 'k': k, 'v': v, 'log_decay': log_decay, 'beta': beta, 'gamma': gamma}
