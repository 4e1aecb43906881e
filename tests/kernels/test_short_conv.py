"""The short convolution's kernels without a GPU: interpreted, compiled, and inside a layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('triton')

from jax.sharding import NamedSharding, PartitionSpec

from rla_jax import layers, sharding
from rla_jax.kernels.residual.gpu import selftest
from rla_jax.kernels.short_conv import gpu
from rla_jax.kernels.short_conv.gpu import call
from rla_jax.kernels.short_conv.gpu import selftest as cases
from rla_jax.kernels.short_conv.gpu.backward import backward_kernel
from rla_jax.kernels.short_conv.gpu.forward import forward_kernel
from rla_jax.layers import head_inputs, recurrent, split
from rla_jax.layers.settings import Settings
from tests.kernels import triton_harness as harness
from tests.layers.helpers import error

BARS = {'float32': 2e-5, 'bfloat16': 0.005, 'float16': 0.005}
COLLECTIVES = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute')


@dataclasses.dataclass(frozen=True)
class Case:
  """A problem; `documents` is the mean length of one."""

  T: int = 21
  H: int = 2
  S: int = 64
  B: int = 1
  W: int = 4
  dtype: str = 'float32'
  tail: bool = False
  documents: int | None = None
  norm: bool = True
  activation: str = 'silu'
  size: float = 1.0  # of the inputs
  shield: bool = False


CASES = {
  'documents, tail': Case(H=1, B=2, documents=5, tail=True),
  'mixed tiles and others': Case(T=69, H=1, documents=25),
  'ends where a tile ends': Case(T=32, S=8),
  'fewer tokens than taps': Case(T=2, tail=True),
  'one token': Case(T=1, documents=5, tail=True),
  'heads of 100, three taps': Case(T=9, S=100, H=3, W=3, documents=5, tail=True),
  'heads of 128, no norm': Case(S=128, H=1, norm=False),
  'numbers that swallow a one': Case(T=3, H=1, S=8, norm=False, size=1e9),
  'no activation, two taps': Case(W=2, activation='none', norm=False, documents=5, tail=True),
  'no activation, norm': Case(T=11, H=5, activation='none', S=12),
  'bfloat16': Case(dtype='bfloat16', documents=5, tail=True),
  'float16': Case(T=9, dtype='float16', S=16),
}
# Each of these has most in common with one that always runs.
RARE = (
  'ends where a tile ends', 'one token', 'heads of 128, no norm', 'no activation, norm', 'float16'
)  # fmt: skip


def problem(case, seed=0):
  """h, taps, tail, documents and the cotangent."""
  rng = np.random.default_rng(seed)
  B, T, X = case.B, case.T, case.H * case.S
  h, tail = (case.size * rng.standard_normal((B, n, X)) for n in (T, case.W - 1))
  taps = rng.uniform(-1, 1, (case.W, X))
  documents = None
  if case.documents:
    starts = rng.random((B, T)) < 1 / case.documents
    documents = jnp.asarray(np.cumsum(starts, 1) - starts[:, :1], jnp.int32)
  dy = rng.standard_normal((B, T, case.H, case.S))
  h, tail, dy = (jnp.asarray(x, case.dtype) for x in (h, tail, dy))
  return h, jnp.asarray(taps, jnp.float32), tail if case.tail else None, documents, dy


def options(case):
  scale = case.S**-0.5 if case.norm else 1.0
  return {'size': case.S, 'activation': case.activation, 'norm': case.norm, 'scale': scale}


@functools.cache  # the same function is compiled once
def interpreted(case):
  """The kernels with tiles of 16 tokens and, of small heads, of some heads."""
  silu, scale = case.activation == 'silu', options(case)['scale']
  tiles = call.Tile(32, 16, 4), call.Tile(32, 16, 2)
  config = call.Config(silu, case.norm, scale, 1e-6, case.shield, True, *tiles)

  def run(h, taps, tail, documents):
    h, taps, tail = (
      None if x is None else x.reshape(*x.shape[:-1], -1, case.S) for x in (h, taps, tail)
    )
    return call.convolve(config, h, taps, tail, documents)

  return run


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, h, taps, tail, documents, dy):
  y, pull = jax.vjp(lambda *x: function(*x, documents), h, taps, tail)
  return dict(zip(('y', 'dh', 'dtaps', 'dtail'), (y, *pull(dy)), strict=True))


def exact(case, h, taps, tail, documents, dy):
  """In float64, by the formulas, without a compiler; the self-test has them by JAX's own rules."""
  h, taps, dy = (np.asarray(x, np.float64) for x in (h, taps, dy))
  B, T, X = h.shape
  before = np.zeros((B, case.W - 1, X)) if tail is None else np.asarray(tail, np.float64)
  inputs = np.concatenate([before, h], axis=1)
  documents = np.zeros((B, T), int) if documents is None else np.asarray(documents)
  all_documents = np.pad(documents, ((0, 0), (case.W - 1, 0)))
  seen = [(all_documents[:, i : i + T] == documents)[..., None] for i in range(case.W)]
  z = sum(np.where(seen[i], inputs[:, i : i + T], 0) * taps[i] for i in range(case.W))
  gate = (1 + np.tanh(z / 2)) / 2 if case.activation == 'silu' else np.ones_like(z)
  slope = gate + z * gate * (1 - gate)
  a, scale = (z * gate).reshape(dy.shape), options(case)['scale']
  if case.norm:
    n = 1 / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6)
    da = scale * (n * dy - n**3 * (a * dy).sum(-1, keepdims=True) * a)
  else:
    n, da = 1, scale * dy
  dz = da.reshape(B, T, X) * slope
  dinputs, dtaps = np.zeros_like(inputs), np.zeros_like(taps)
  for i in range(case.W):
    dinputs[:, i : i + T] += np.where(seen[i], dz * taps[i], 0)
    dtaps[i] = (np.where(seen[i], inputs[:, i : i + T], 0) * dz).sum((0, 1))
  dtail, dh = np.split(dinputs, [case.W - 1], axis=1)
  return {'y': scale * n * a, 'dh': dh, 'dtaps': dtaps, 'dtail': None if tail is None else dtail}


@pytest.mark.parametrize(
  'name', [pytest.param(n, marks=[pytest.mark.slow] * (n in RARE)) for n in CASES]
)
def test_values_and_gradients(name):
  case = CASES[name]
  arguments = problem(case)
  got = value_and_gradients(interpreted(case), *arguments)
  want = exact(case, *arguments)
  assert got['y'].dtype == case.dtype and got['dtaps'].dtype == jnp.float32
  for key, x in got.items():
    if want[key] is not None:
      # Sums over all tokens are float32 whatever the inputs are.
      bar = BARS['float32' if key == 'dtaps' else case.dtype]
      assert x.shape == want[key].shape and error(x, want[key]) < bar, (key, error(x, want[key]))


def test_what_is_not_finite_stays_in_its_document():
  """Also where a tile ends, whose neighbour computes its gradient."""
  case = Case(T=32, H=1, S=8, tail=True)
  h, taps, tail, _, dy = problem(case)
  ids = np.repeat([0, 1], 16)  # a tile has 16 tokens
  documents = jnp.asarray(ids[None], jnp.int32)
  clean = value_and_gradients(interpreted(case), h, taps, tail, documents, dy)
  broken = {
    'last of 0': (h.at[:, 15].set(jnp.nan), tail),
    'first of 1': (h.at[:, 16].set(jnp.nan), tail),
    'tail of 0': (h, tail.at[:, -1].set(jnp.nan)),
  }
  for at, (h, tail) in broken.items():
    found = value_and_gradients(interpreted(case), h, taps, tail, documents, dy)
    others = ids != int(at[-1])
    for key in ('y', 'dh'):
      assert np.isnan(found[key][:, ~others]).any(), at
      np.testing.assert_array_equal(found[key][:, others], clean[key][:, others], err_msg=at)
    assert np.isnan(found['dtail']).any() == (at == 'tail of 0')


@pytest.mark.parametrize('norm', [True, False])
@pytest.mark.parametrize('dtype', ['bfloat16', pytest.param('float16', marks=pytest.mark.slow)])
def test_shield(norm, dtype):
  """A head that is not finite is zeros and told; all else is as without, gradients too."""
  case = Case(T=21, H=3, S=8, documents=6, tail=True, norm=norm, dtype=dtype)
  h, taps, tail, documents, dy = problem(case)
  h = h.at[0, 4, 9].set(jnp.nan).at[0, 17, 3].set(jnp.inf)
  clean = value_and_gradients(interpreted(case), h, taps, tail, documents, dy)
  run = interpreted(dataclasses.replace(case, shield=True))
  (y, faults), pull = jax.vjp(lambda h: run(h, taps, tail, documents), h)
  broken = ~np.isfinite(np.asarray(clean['y'], np.float32)).all(axis=-1)
  assert broken[0, 4, 1] and broken[0, 17, 0] and broken.sum() < 12
  np.testing.assert_array_equal(faults, broken)
  wanted = jnp.where(broken[..., None], 0, clean['y'])
  np.testing.assert_array_equal(y.astype(jnp.float32), wanted.astype(jnp.float32))
  (dh,) = pull((dy, np.zeros(faults.shape, jax.dtypes.float0)))
  np.testing.assert_array_equal(dh.astype(jnp.float32), clean['dh'].astype(jnp.float32))


@pytest.mark.parametrize('shared_h', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_members_under_vmap(shared_h):
  """Each of several models has its own taps, and gradients of its own; documents are shared."""
  case, members = Case(T=5, B=2, S=8, documents=3), 2
  draws = [problem(case, seed) for seed in range(members)]
  h, taps, dy = (jnp.stack([draw[i] for draw in draws]) for i in (0, 1, 4))
  documents = draws[0][3]
  assert documents.max() > 0
  if shared_h:
    h = h[0]

  def member(h, taps, dy):
    return value_and_gradients(interpreted(case), h, taps, None, documents, dy)

  got = jax.vmap(member, in_axes=(None if shared_h else 0, 0, 0))(h, taps, dy)
  for i in range(members):
    want = exact(case, h if shared_h else h[i], taps[i], None, documents, dy[i])
    for key in ('y', 'dh', 'dtaps'):
      assert error(got[key][i], want[key]) < 2e-5, (key, i)


def test_partitioned_call_gathers_nothing():
  """Forward and backward on sequences and heads of their own; only dtaps is summed."""
  case = Case(T=16, B=4, H=4, S=8, documents=5, tail=True)
  mesh = sharding.make_mesh(data=4, tensor=2)
  arguments = problem(case)
  specs = [('data', None, 'tensor'), (None, 'tensor'), ('data', None, 'tensor'), ('data',)]
  specs.append(('data', None, 'tensor'))
  placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*s)))
            for x, s in zip(arguments, specs, strict=True)]  # fmt: skip
  function = functools.partial(value_and_gradients, interpreted(case))
  text = jax.jit(function).lower(*placed).compile().as_text()
  assert [x for x in COLLECTIVES if x in text] == ['all-reduce']
  assert all(f'f32[{case.W},2,8]' in x for x in text.splitlines() if ' all-reduce(' in x)


@pytest.mark.parametrize(
  ('backward', 'dtype', 'capability'),
  [
    (True, 'bf16', 90),
    (False, 'bf16', 90),
    *(pytest.param(b, d, c, marks=pytest.mark.slow)
      for b in (True, False) for d, c in (('bf16', 80), ('fp32', 90), ('fp16', 80))),
  ],
)  # fmt: skip
@pytest.mark.parametrize(
  'size', [128, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 100, 256))]
)
def test_compiles_without_spills(backward, dtype, capability, size):
  kernel, tile = (backward_kernel, call.BACKWARD) if backward else (forward_kernel, call.FORWARD)
  block_s = 128 if size == 100 else size
  block_h = max(1, tile.channels // block_s)
  x = f'*{dtype}'
  given = [x, '*fp32', x, '*i32', *([x] if backward else []), 'i32', 'i32']
  compiled = harness.compile_kernel(
    kernel,
    given + ([x, '*fp32', x] if backward else [x, '*i8']),
    {
      'H': 8, 'S': size, 'BLOCK_H': block_h, 'BLOCK_S': block_s, 'WIDTH': 4, 'ROW_TAPS': False,
      'TOKENS': tile.tokens, 'GROUP': tile.group, 'TAIL': True, 'SEGMENTED': True, 'SILU': True,
      'NORM': True, 'SCALE': 0.1, 'EPS': 1e-6, **({} if backward else {'SHIELD': True}),
    },
    capability=capability,
    num_warps=block_h * block_s // (32 * tile.each),
    num_stages=1,
  )  # fmt: skip
  assert compiled.spill_bytes == 0
  if size <= 128 and capability == 90:
    assert compiled.registers <= 128  # sixteen warps a multiprocessor
  # Four channels at a time, of inputs and results.
  bits = 32 if dtype == 'fp32' else 16
  assert f'ld.global.v{4 * bits // 32}.b32' in compiled.ptx
  assert f'st.global.v{4 * bits // 32}.b32' in compiled.ptx


@pytest.mark.parametrize('wrong', [pytest.param(False, marks=pytest.mark.slow), True])
def test_self_test(monkeypatch, capsys, wrong):
  """It passes the kernels, and finds one part in ten thousand of a gradient."""
  monkeypatch.setattr(cases, 'T', 20)
  if wrong:
    backward = call._backward

    def miscompiled(config):
      def run(*arguments):
        dh, dtaps, dtail = backward(config)(*arguments)
        return dh, 1.0001 * dtaps, dtail

      return run

    monkeypatch.setattr(call, '_backward', miscompiled)
  case = cases.Case('float32', 4, norm=True, packed=True)
  assert case in cases.cases([4], ['float32'])
  assert selftest.report('x', selftest.check_short_conv(case, interpret=True)) != wrong
  assert ('WRONG x: worst dtaps' in capsys.readouterr().out) == wrong


# --- in the layers ---


@pytest.mark.parametrize(
  ('change', 'reason'),
  [
    ({}, None),
    ({'implementation': 'triton'}, None),
    ({'implementation': ('chunked', 'triton')}, "first implementation is 'chunked'"),
    ({'conv_width': None}, 'the layer has none'),
    ({'conv_width': 5}, '2, 3 or 4 tokens, not 5'),
    ({'rope_base': 1e4}, 'no rotary'),
    ({'head_dim': 512}, 'up to 256 channels, not 512'),
    ({'length': 1}, 'one token'),
    ({'dtype': jnp.float64}, 'not float64'),
    ({'platform': 'tpu', 'implementation': 'triton'}, "the platform is 'tpu'"),
    ({'platform': 'cpu'}, "first implementation is 'chunked'"),
  ],
)
def test_layers_say_why_they_do_not_use_the_kernel(monkeypatch, change, reason):
  change = {'length': 16, 'dtype': jnp.bfloat16, 'platform': 'gpu'} | change
  length, dtype, platform = (change.pop(name) for name in ('length', 'dtype', 'platform'))
  for module in ('rla_jax.layers.head_inputs', 'rla_jax.ops.dispatch'):
    monkeypatch.setattr(f'{module}.current_platform', lambda: platform)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: name)
  found = head_inputs.explain_kernel(Settings(**change), 'q', length, dtype)
  assert found is None if reason is None else reason in found


@pytest.fixture
def kernel(monkeypatch):
  """Switches the interpreted kernel on and off in the layers; its calls are counted."""
  calls = []

  def run(*arguments, **more):
    calls.append(more)
    return gpu_short_conv(*arguments, interpret=True, **more)

  gpu_short_conv, explain = gpu.short_conv, head_inputs.explain_kernel

  def switch(on):
    calls.clear()
    monkeypatch.setattr(gpu, 'short_conv', run)
    monkeypatch.setattr(head_inputs, 'explain_kernel', (lambda *_: None) if on else explain)
    return calls

  return switch


def test_layer_with_the_kernel(kernel, monkeypatch):
  """Values, gradients and cache of a layer that goes on from a cache, around a simple operator."""

  def recur(s, finite, heads, gates, segment_ids, state):
    scores_BTH = jnp.repeat(jnp.sum(heads['q'] * heads['k'], -1), 2, axis=2)
    return scores_BTH[..., None] * heads['v'], state

  monkeypatch.setattr(recurrent, '_recur', recur)
  layer = layers.ResidualDeltaNet(
    num_heads=4, num_qk_heads=2, head_dim=8, output_gate='none', output_norm='none'
  )
  x = jax.random.normal(jax.random.key(0), (1, 5, 24))
  ids = jnp.asarray([[0] * 3 + [1] * 2])
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype),
    jax.eval_shape(layer.init, jax.random.key(1), x),
  )
  cache = layer.init_cache(1, 5)
  keys = jax.random.split(jax.random.key(2), 3)
  tails = {name: jax.random.normal(key, cache.tails[name].shape)
           for name, key in zip('qkv', keys, strict=True)}  # fmt: skip

  def run(params, x, tails):
    y, new = layer.apply(params, x, ids, cache._replace(tails=tails))
    return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), (y, new)

  def everything():
    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(params, x, tails)

  calls = kernel(on=False)
  want = everything()
  assert not calls
  calls = kernel(on=True)
  got = everything()
  assert [c['norm'] for c in calls] == [True, True, False]
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('decay', ['scalar', 'none'])
def test_layer_keeps_what_is_not_finite_in_its_document(kernel, decay):
  """With the kernel the operator does not search q, k and v, and is told what it would find."""
  layer = layers.ResidualDeltaNet(
    num_heads=2, head_dim=8, decay=decay, implementation='reference', dtype=jnp.bfloat16
  )
  x = jax.random.normal(jax.random.key(0), (1, 12, 16)).at[0, 6, 3].set(jnp.nan)
  ids = jnp.asarray([[0] * 4 + [1] * 4 + [2] * 4])
  params = layer.init(jax.random.key(1), x)

  def everything():
    y, pull = jax.vjp(lambda x: layer.apply(params, x, ids), x)
    return y.astype(jnp.float32), pull(jnp.ones_like(y))[0]

  kernel(on=False)
  want = jax.jit(lambda: everything())()
  calls = kernel(on=True)
  got = jax.jit(lambda: everything())()
  assert [c['shield'] for c in calls[:3]] == [True] * 3
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02)
  assert np.isnan(got[0][0]).any(axis=-1).tolist() == [6 <= t < 8 for t in range(12)]
  assert np.isnan(got[1][0]).any(axis=-1).tolist() == [4 <= t < 8 for t in range(12)]


def test_kernel_on_a_split_sequence(kernel):
  """The inputs before a shard come from its neighbour, and their gradient goes there."""
  s = Settings(num_heads=2, head_dim=8)
  case = Case(T=16, B=2, S=8)
  h, taps, _, _, dy = problem(case)
  ids = jnp.asarray([[0] * 7 + [1] * 9, [0] * 16])
  function = functools.partial(recurrent.head_inputs, s, 'q')

  def run(h, taps, tail, documents):
    assert tail is None and documents is None
    return split.divide(2, 16).head_inputs(function, 2, h, taps, ids, None, jnp.arange(16))[0]

  kernel(on=True)
  with jax.set_mesh(sharding.make_mesh(data=1, seq=2, devices=jax.devices()[:2])):
    got = value_and_gradients(run, h, taps, None, None, dy)
  want = exact(case, h, taps, None, ids, dy)
  for key in ('y', 'dh', 'dtaps'):
    assert error(got[key], want[key]) < 2e-5, key
