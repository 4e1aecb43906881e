"""The Triton decode step: through the interpreter, and as compiled for two GPU generations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('triton')

from rla_jax import ops
from rla_jax.kernels.residual.gpu import step
from rla_jax.ops import triton as triton_form
from rla_jax.ops.inputs import Options, repeat_heads
from rla_jax.ops.state import ResidualState
from rla_jax.ops.step import advance
from rla_jax.ops.validate import canonicalise_step
from tests.errors import error
from tests.kernels import triton_harness as harness

BARS = {jnp.float32: 2e-6, jnp.bfloat16: 0.003, jnp.float16: 4e-4}  # o is rounded to the dtype once


def make_inputs(seed, *, B=2, G=2, H=4, K=16, V=32, dtype=jnp.float32, residual=True):
  rng = np.random.default_rng(seed)
  q, k = rng.normal(size=(2, B, G, K))
  q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
  v = rng.normal(size=(B, H, V))
  log_decay = -rng.uniform(0, 3, (B, H))
  log_decay[0, 0] = -np.inf  # a full reset
  beta, gamma = rng.uniform(0, 2, (2, B, H))
  states = rng.normal(size=(2, B, H, K, V))
  q, k, v = (jnp.asarray(x.astype(dtype)) for x in (q, k, v))
  arrays = (log_decay, beta, gamma, *states)
  log_decay, beta, gamma, base, state = (jnp.asarray(x.astype(np.float32)) for x in arrays)
  if not residual:
    gamma = state = None
  return q, k, v, log_decay, beta, gamma, base, state


def definition(q, k, v, log_decay, beta, gamma, base, residual, *, update, clip, readout):
  q, k = (repeat_heads(x[:, None], v.shape[1])[:, 0] for x in (q, k))
  options = Options(update, clip, readout, None)
  state = ResidualState(base, residual)
  state, o = advance(state, q, k, v, log_decay[..., None], beta, gamma, options)
  return o, state.base, state.residual


def expected(*inputs, **options):
  """The definition, in float64."""
  with jax.enable_x64(True):
    inputs = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
    return jax.tree.map(np.asarray, jax.jit(functools.partial(definition, **options))(*inputs))


def assert_close(actual, wanted, bars):
  for name, x, y, bar in zip(('o', 'base', 'residual'), actual, wanted, bars, strict=True):
    if y is None:
      assert x is None
      continue
    found = error(x, y)
    assert found < bar, f'{name}: {found:.2e}'


@pytest.mark.parametrize('readout', ['gated', 'sum'])
@pytest.mark.parametrize('clip', [None, 0.7])
@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('update', ['additive', 'delta'])
def test_matches_definition(update, residual, clip, readout):
  inputs = make_inputs(0, residual=residual)
  options = {'update': update, 'clip': clip, 'readout': readout}
  call = functools.partial(step.residual_attention_step, interpret=True, **options)
  actual = jax.jit(call)(*inputs)
  assert_close(actual, expected(*inputs, **options), (2e-6,) * 3)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
  'sizes',
  [
    {'B': 1, 'G': 1, 'H': 1, 'K': 128, 'V': 128},
    {'B': 3, 'G': 1, 'H': 3, 'K': 100, 'V': 36},
    {'B': 2, 'G': 3, 'H': 3, 'K': 17, 'V': 5},
    {'B': 1, 'G': 1, 'H': 2, 'K': 256, 'V': 64},
  ],
  ids=lambda sizes: '-'.join(f'{n}{s}' for n, s in sizes.items()),
)
def test_sizes_and_dtypes(sizes, dtype):
  inputs = make_inputs(1, dtype=dtype, **sizes)
  options = {'update': 'delta', 'clip': 1.0, 'readout': 'gated'}
  actual = step.residual_attention_step(*inputs, interpret=True, **options)
  assert actual[0].dtype == dtype
  assert_close(actual, expected(*inputs, **options), (BARS[dtype], 2e-6, 2e-6))


def test_decoding_continues_a_prefill():
  """A prefill hands its state to the step kernel: the same as the whole sequence at once."""
  B, T, H, K = 2, 9, 2, 16
  rng = np.random.default_rng(2)
  q, k, v = rng.normal(size=(3, B, T, H, K)).astype(np.float32) / 4
  decay, beta, gamma = rng.uniform(0.1, 1, (3, B, T, H)).astype(np.float32)
  arrays = tuple(map(jnp.asarray, (q, k, v, np.log(decay), beta, gamma)))
  wanted, final = ops.residual_delta_rule(*arrays, implementation='reference')
  _, state = ops.residual_delta_rule(*(x[:, :5] for x in arrays), implementation='reference')

  def body(state, token):
    o, base, residual = step.residual_attention_step(
      *token, *state, update='delta', clip=1.0, readout='gated', interpret=True
    )
    return (base, residual), o

  tokens = tuple(jnp.moveaxis(x[:, 5:], 1, 0) for x in arrays)
  state, o_TBHV = jax.lax.scan(body, tuple(state), tokens)
  np.testing.assert_allclose(jnp.moveaxis(o_TBHV, 0, 1), wanted[:, 5:], rtol=1e-5, atol=1e-6)
  for x, y in zip(state, final, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('residual', [True, False])
@pytest.mark.parametrize('update', ['additive', 'delta'])
def test_gradient_is_that_of_the_definition(update, residual):
  inputs = make_inputs(3, residual=residual)
  options = {'update': update, 'clip': 0.7, 'readout': 'gated'}
  rng = np.random.default_rng(9)

  @jax.jit
  def gradients(cotangents):
    by_kernel = functools.partial(step.residual_attention_step, interpret=True, **options)
    by_definition = functools.partial(definition, **options)
    return [jax.vjp(f, *inputs)[1](cotangents) for f in (by_kernel, by_definition)]

  outputs = jax.eval_shape(functools.partial(definition, **options), *inputs)
  cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), outputs)
  actual, wanted = gradients(cotangents)
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_vmap_joins_the_batch():
  inputs = [make_inputs(seed) for seed in range(3)]
  call = functools.partial(
    step.residual_attention_step, update='delta', clip=1.0, readout='gated', interpret=True
  )
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
  shared_keys = (0, None, *(0,) * 6)  # k is the same for all
  actual = jax.vmap(call, in_axes=shared_keys)(*(stacked[0], inputs[0][1], *stacked[2:]))
  for i in range(3):
    q, _, *rest = inputs[i]
    for x, y in zip(actual, call(q, inputs[0][1], *rest), strict=True):
      np.testing.assert_array_equal(x[i], y)


def test_refuses_what_it_cannot_serve():
  inputs = make_inputs(0, K=300, V=16)
  options = {'update': 'delta', 'clip': 1.0, 'readout': 'gated'}
  with pytest.raises(ValueError, match='key size 300'):
    step.residual_attention_step(*inputs, interpret=True, **options)
  *inputs, base, residual = make_inputs(0)
  with pytest.raises(ValueError, match='base has dtype float16'):
    step.residual_attention_step(*inputs, base.astype(jnp.float16), residual, **options)


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('size', [64, 100, 128, 256])
def test_compiles_without_spills(size, capability):
  block_k, block_v, num_warps = step._blocks(size, size)
  compiled = harness.compile_kernel(
    step.step_kernel,
    ['*bf16'] * 3 + ['*fp32'] * 5 + ['*bf16', '*fp32', '*fp32'],
    {
      'HEADS': 16, 'GROUP': 1, 'KEY': size, 'VALUE': size, 'BLOCK_K': block_k, 'BLOCK_V': block_v,
      'DELTA': True, 'RESIDUAL': True, 'GATED': True, 'CLIP': 1.0,
    },
    capability=capability,
    num_warps=num_warps,
    num_stages=1,
  )  # fmt: skip
  assert compiled.spill_bytes == 0
  assert compiled.registers <= 168  # three programs of 128 threads a multiprocessor, or more
  assert 'ld.global.v4' in compiled.ptx and 'st.global.v4' in compiled.ptx  # 16 bytes a thread


def test_decode_has_both_readouts_but_no_decay_a_channel(monkeypatch):
  """What `implementation='triton'` answers for one token."""
  monkeypatch.setattr(triton_form, 'current_platform', lambda: 'cuda')
  monkeypatch.setattr(triton_form.importlib.util, 'find_spec', lambda name: name)
  q = k = v = jnp.zeros((2, 3, 16))
  gate, state = jnp.zeros((2, 3)), jnp.zeros((2, 3, 16, 16))

  def answer(log_decay, readout):
    state_ = ops.ResidualState(state, state)
    inputs, options = canonicalise_step(
      'delta', q, k, v, log_decay, gate, gate, state_, clip=1.0, readout=readout
    )
    return triton_form.unsupported(inputs, options)

  assert answer(gate, 'gated') is None
  assert answer(gate, 'sum') is None
  assert 'decay' in answer(jnp.zeros((2, 3, 16)), 'gated')
