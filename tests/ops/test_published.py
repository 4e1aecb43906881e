"""Named models and identities: the operators against published forms, written out here in float64.

Each model is in the form of its own paper (often the transposed state, or the parallel form), with
loops over batch and heads left to numpy.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import ops
from tests.ops import cases, harness

IMPLEMENTATIONS = ('reference', 'chunked', 'associative')
implementations = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
B, T, H, K, V = 1, 70, 2, 8, 12
TOLERANCE = 1e-5


def _inputs():
  rng = np.random.default_rng(11)
  q, k = cases.unit(rng.normal(size=(2, B, T, H, K)))
  v = rng.normal(size=(B, T, H, V))
  return rng, *(x.astype(np.float32).astype(np.float64) for x in (q, k, v))


def _float32(x):
  """Rounded to float32 once, so that both sides see the same numbers."""
  return np.asarray(x, np.float32).astype(np.float64)


def linear_attention(q, k, v):
  """Katharopoulos et al. 2020 without normaliser, parallel form: o = tril(q k^T) v."""
  return np.einsum('bthk,bshk,ts,bshv->bthv', q, k, np.tril(np.ones((T, T))), v)


def retnet(q, k, v, decay_H):
  """Sun et al. 2023, parallel form: (q k^T * D) v with D_ts = decay^(t - s)."""
  t = np.arange(T)
  power = np.maximum(t[:, None] - t, 0)
  D_HTS = np.tril(decay_H[:, None, None] ** power)
  return np.einsum('bthk,bshk,hts,bshv->bthv', q, k, D_HTS, v)


def mamba2(x, delta, A, B_in, C_out, D):
  """Dao and Gu 2024: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t, y_t = C_t h_t + D x_t.

  x [B, T, H, P], delta [B, T, H], A and D [H]; B and C [B, T, N] are shared by the heads.
  """
  h = np.zeros((x.shape[0], x.shape[2], x.shape[3], B_in.shape[-1]))
  y = np.zeros_like(x)
  for t in range(x.shape[1]):
    step = delta[:, t, :, None, None]
    h = np.exp(step * A[:, None, None]) * h
    h = h + step * x[:, t, :, :, None] * B_in[:, t, None, None, :]
    y[:, t] = np.einsum('bhpn,bn->bhp', h, C_out[:, t]) + D[:, None] * x[:, t]
  return y


def gla(q, k, v, alpha):
  """Yang et al. 2024: S_t = (alpha_t 1^T) * S_{t-1} + k_t v_t^T, o_t = q_t S_t."""
  S = np.zeros((B, H, K, V))
  o = np.zeros_like(v)
  for t in range(T):
    S = alpha[:, t, ..., None] * S + k[:, t, ..., None] * v[:, t, :, None]
    o[:, t] = np.einsum('bhk,bhkv->bhv', q[:, t], S)
  return o


def deltanet(q, k, v, beta):
  """Schlag et al. 2021, Yang et al. 2024: S_t = S_{t-1} - beta_t (S_{t-1} k_t - v_t) k_t^T."""
  S = np.zeros((B, H, V, K))
  o = np.zeros_like(v)
  for t in range(T):
    error = np.einsum('bhvk,bhk->bhv', S, k[:, t]) - v[:, t]
    S = S - beta[:, t, :, None, None] * error[..., None] * k[:, t, :, None]
    o[:, t] = np.einsum('bhvk,bhk->bhv', S, q[:, t])
  return o


def gated_deltanet(q, k, v, alpha, beta):
  """Yang et al. 2025: S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T."""
  S = np.zeros((B, H, V, K))
  o = np.zeros_like(v)
  for t in range(T):
    kk = k[:, t, ..., None] * k[:, t, :, None]
    b = beta[:, t, :, None, None]
    S = S @ (alpha[:, t, :, None, None] * (np.eye(K) - b * kk))
    S = S + b * v[:, t, ..., None] * k[:, t, :, None]
    o[:, t] = np.einsum('bhvk,bhk->bhv', S, q[:, t])
  return o


def kimi_delta_attention(q, k, v, alpha, beta):
  """Kimi Linear 2025: S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T."""
  S = np.zeros((B, H, K, V))
  o = np.zeros_like(v)
  for t in range(T):
    kk = k[:, t, ..., None] * k[:, t, :, None]
    b = beta[:, t, :, None, None]
    diagonal = alpha[:, t, ..., None] * np.eye(K)
    S = (np.eye(K) - b * kk) @ diagonal @ S + b * k[:, t, ..., None] * v[:, t, :, None]
    o[:, t] = np.einsum('bhkv,bhk->bhv', S, q[:, t])
  return o


def _check(update, want, implementation, *args, **kwargs):
  single = [None if x is None else jnp.asarray(x, jnp.float32) for x in args]
  o, _ = harness.OPERATORS[update](*single, implementation=implementation, **kwargs)
  assert harness.error(np.asarray(o, np.float64), want) < TOLERANCE


@implementations
def test_linear_attention(implementation):
  _, q, k, v = _inputs()
  _check('additive', linear_attention(q, k, v), implementation, q, k, v)


@implementations
def test_retnet(implementation):
  _, q, k, v = _inputs()
  log_decay = _float32(np.broadcast_to(np.log(1 - 2.0 ** (-5 - np.arange(H))), (B, T, H)))
  want = retnet(q, k, v, np.exp(log_decay[0, 0]))
  _check('additive', want, implementation, q, k, v, log_decay)


@implementations
def test_mamba2(implementation):
  """B and C are k and q, one group for all heads; delta is beta, and delta A the log decay."""
  rng, q, k, v = _inputs()
  delta = _float32(rng.uniform(0.01, 0.5, (B, T, H)))
  A, D = -np.array([1.0, 4.0]), np.array([0.5, 2.0])
  want = mamba2(v, delta, A, k[:, :, 0], q[:, :, 0], D) - D[:, None] * v
  _check('additive', want, implementation, q[:, :, :1], k[:, :, :1], v, delta * A, delta)


@implementations
def test_gla(implementation):
  rng, q, k, v = _inputs()
  log_decay = _float32(np.log(rng.uniform(0.3, 1, (B, T, H, K))))
  _check('additive', gla(q, k, v, np.exp(log_decay)), implementation, q, k, v, log_decay)


@implementations
def test_deltanet(implementation):
  rng, q, k, v = _inputs()
  beta = _float32(rng.uniform(0, 1, (B, T, H)))
  _check('delta', deltanet(q, k, v, beta), implementation, q, k, v, None, beta)


@implementations
def test_gated_deltanet(implementation):
  rng, q, k, v = _inputs()
  beta, log_decay = _float32(rng.uniform(0, 1, (B, T, H))), _float32(-rng.random((B, T, H)))
  want = gated_deltanet(q, k, v, np.exp(log_decay), beta)
  _check('delta', want, implementation, q, k, v, log_decay, beta)


@implementations
def test_kimi_delta_attention(implementation):
  rng, q, k, v = _inputs()
  beta, log_decay = _float32(rng.uniform(0, 1, (B, T, H))), _float32(-rng.random((B, T, H, K)))
  want = kimi_delta_attention(q, k, v, np.exp(log_decay), beta)
  _check('delta', want, implementation, q, k, v, log_decay, beta)


@implementations
@pytest.mark.parametrize('update', cases.UPDATES)
def test_orthonormal_keys_leave_nothing_predicted(update, implementation):
  """No key has been seen, so the residual is v itself: R = S, and o is known in closed form."""
  rng, *_ = _inputs()
  size = 16
  k = _float32(np.linalg.qr(rng.normal(size=(size, size)))[0])[None, :, None]
  q, v = _float32(rng.normal(size=(2, 1, size, 1, size)))
  scores = q[0, :, 0] @ k[0, :, 0].T
  want = (np.tril(scores, -1) + np.tril(scores)) @ v[0, :, 0]
  written = k[0, :, 0].T @ v[0, :, 0]
  q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
  one = jnp.ones((1, size, 1))
  o, state = harness.OPERATORS[update](
    q, k, v, 0 * one, one, one, clip=None, implementation=implementation
  )
  assert harness.error(np.asarray(o[0, :, 0], np.float64), want) < TOLERANCE
  assert harness.error(np.asarray(state.base[0, 0], np.float64), written) < TOLERANCE
  assert harness.error(np.asarray(state.residual[0, 0], np.float64), written) < TOLERANCE


@implementations
@pytest.mark.parametrize('update', cases.UPDATES)
def test_gamma_zero_reads_the_base_state_alone(update, implementation):
  """o_t = alpha_t S_{t-1}^T q_t: what the base model reads from a token that writes nothing."""
  rng, q, k, v = _inputs()
  gates = -rng.random((B, T, H)), rng.random((B, T, H))
  q, k, v, log_decay, beta = (jnp.asarray(x, jnp.float32) for x in (q, k, v, *gates))
  operator = harness.OPERATORS[update]
  o, _ = operator(q, k, v, log_decay, beta, jnp.zeros_like(beta), implementation=implementation)
  # Each token twice: first it reads and writes nothing, then it writes and does not decay again.
  def twice(x, first, second):
    return jnp.stack([first(x), second(x)], axis=2).reshape(B, 2 * T, *x.shape[2:])

  def same(x):
    return x

  doubled = [twice(x, same, same) for x in (q, k, v)]
  gates = twice(log_decay, same, jnp.zeros_like), twice(beta, jnp.zeros_like, same)
  want, _ = operator(*doubled, *gates, implementation=implementation)
  assert harness.error(np.asarray(o, np.float64), np.asarray(want[:, ::2], np.float64)) < TOLERANCE


@implementations
def test_a_fact_seen_twice_leaves_no_residual(implementation):
  """The delta rule with beta = gamma = 1: the second time S predicts it and R forgets."""
  k = np.zeros((1, 2, 1, 4), np.float32)
  k[..., 1] = 1
  v = np.full((1, 2, 1, 3), 0.75, np.float32)
  one = jnp.ones((1, 2, 1))
  o, state = ops.residual_delta_rule(
    jnp.asarray(k), jnp.asarray(k), jnp.asarray(v), None, one, one, implementation=implementation
  )
  # First the residual state answers, then the base state does.
  np.testing.assert_allclose(o, v, rtol=1e-6)
  np.testing.assert_allclose(state.base[0, 0, 1], v[0, 0, 0], rtol=1e-6)
  np.testing.assert_allclose(state.residual, np.zeros((1, 1, 4, 3)), atol=1e-6)


@implementations
@pytest.mark.parametrize('update', cases.UPDATES)
def test_without_a_clip_the_operator_is_linear_in_values_and_states(update, implementation):
  rng, q, k, v = _inputs()
  gates = -rng.random((B, T, H)), rng.random((B, T, H)), rng.random((B, T, H))
  q, k, v, *gates = (jnp.asarray(x, jnp.float32) for x in (q, k, v, *gates))
  states = jnp.asarray(rng.normal(size=(2, B, H, K, V)), jnp.float32)

  def run(v, states):
    return harness.OPERATORS[update](
      q, k, v, *gates, clip=None, initial_state=ops.ResidualState(*states),
      implementation=implementation,
    )[0]  # fmt: skip

  # A power of two scales every float exactly.
  np.testing.assert_array_equal(run(4 * v, 4 * states), 4 * run(v, states))
