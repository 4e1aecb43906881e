"""The operators under JAX's transformations, alone and together."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from rla_jax import ops
from tests.ops import cases, harness

IMPLEMENTATIONS = ('reference', 'chunked', 'associative')
implementations = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
ARGUMENTS = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma', 'base', 'residual')
T = 20


def _call(update='delta', **sizes):
  return cases.BY_NAME['typical'].call(update, **({'T': T, 'B': 1} | sizes))


def _arrays(call):
  return {name: jnp.asarray(x) for name, x in call.arrays().items()}


def _run(implementation, arrays, segment_ids=None, update='delta'):
  """Outputs by name, of arrays by name."""
  return harness.outputs(
    harness.OPERATORS[update], arrays, segment_ids, chunk_size=8, implementation=implementation
  )


def _loss(implementation, arrays, segment_ids=None, update='delta'):
  """A scalar that depends on everything that comes out."""
  return sum(jnp.sin(x).sum() for x in _run(implementation, arrays, segment_ids, update).values())


def _close(got, want, bar=2e-6):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert harness.error(x, y) <= bar


@implementations
def test_eager_equals_jit(implementation):
  arrays = _arrays(_call())
  run = functools.partial(_run, implementation)
  _close(run(arrays), jax.jit(run)(arrays))


@implementations
@pytest.mark.parametrize('name', [*ARGUMENTS, 'segment_ids'])
def test_vmap_of_one_argument_along_any_axis(implementation, name):
  arrays = _arrays(_call())
  ids = jnp.asarray(np.arange(T)[None] // 7)
  rng = np.random.default_rng(0)
  x = ids if name == 'segment_ids' else arrays[name]
  variants = [x, x[:, ::-1] if name == 'segment_ids' else x * rng.uniform(0.5, 1, x.shape)]
  variants = [v.astype(x.dtype) for v in variants]

  @jax.jit
  def run(x):
    if name == 'segment_ids':
      return _run(implementation, arrays, x)
    return _run(implementation, arrays | {name: x}, ids)

  separate = jax.tree.map(lambda *xs: jnp.stack(xs), *map(run, variants))
  axis = (2 * ARGUMENTS.index(name) + 1) % (x.ndim + 1) if name in ARGUMENTS else 1
  _close(jax.vmap(run, in_axes=axis)(jnp.stack(variants, axis=axis)), separate)


@implementations
@pytest.mark.parametrize('axis', [0, 2, -1])
def test_gradient_of_vmap_of_all_arguments(implementation, axis):
  calls = [_arrays(_call()), _arrays(_call(T=T).replace(q=-_call().k))]
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs, axis=axis), *calls)

  def total(stacked):
    return jax.vmap(functools.partial(_loss, implementation), in_axes=axis)(stacked).sum()

  alone = jax.jit(jax.grad(functools.partial(_loss, implementation)))
  want = jax.tree.map(lambda *xs: jnp.stack(xs, axis=axis), *map(alone, calls))
  _close(jax.jit(jax.grad(total))(stacked), want, 2e-5)


@implementations
def test_vmap_of_gradients_gives_them_a_sample(implementation):
  arrays = _arrays(_call(B=2))
  gradient = jax.grad(functools.partial(_loss, implementation))
  single = jax.vmap(lambda a: gradient(jax.tree.map(lambda x: x[None], a)))
  got = jax.tree.map(lambda x: x[:, 0], jax.jit(single)(arrays))
  _close(got, jax.jit(gradient)(arrays), 2e-5)


@implementations
def test_layers_in_scan_with_checkpoint(implementation):
  """Three layers by lax.scan, each rematerialised: the gradient of three calls in a row."""
  arrays = _arrays(_call(V=8))
  scales = jnp.array([1.0, 0.5, 0.25])

  def layer(v, scale):
    return _run(implementation, arrays | {'v': v})['o'] * scale

  def scanned(v, policy):
    body = jax.checkpoint(lambda v, scale: (layer(v, scale), None), policy=policy)
    return jnp.sin(jax.lax.scan(body, v, scales)[0]).sum()

  def unrolled(v):
    for scale in scales:
      v = layer(v, scale)
    return jnp.sin(v).sum()

  want = jax.jit(jax.grad(unrolled))(arrays['v'])
  for policy in (None, jax.checkpoint_policies.dots_saveable):
    got = jax.jit(jax.grad(functools.partial(scanned, policy=policy)))(arrays['v'])
    _close(got, want)


@implementations
@pytest.mark.parametrize('update', cases.UPDATES)
def test_shard_map_over_batch_and_heads(implementation, update):
  call = _call(update, B=2, G=4, H=8)
  arrays, ids = _arrays(call), jnp.asarray(np.arange(T)[None] // np.array([[7], [11]]))
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  specs = {name: P('data', None, 'tensor') for name in ARGUMENTS}
  specs |= {name: P('data', 'tensor') for name in ('base', 'residual')}
  out_specs = {'o': specs['v'], 'base': specs['base'], 'residual': specs['base']}

  sharded = jax.shard_map(
    functools.partial(_run, implementation, update=update),
    mesh=mesh, in_specs=(specs, P('data')), out_specs=out_specs,
  )  # fmt: skip

  def both(run, arrays, ids, cotangents):
    out, pull = jax.vjp(lambda a: run(a, ids), arrays)
    return out, pull(cotangents)[0]

  cotangents = jax.tree.map(jnp.asarray, cases.cotangents(call))
  placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
  compiled = jax.jit(functools.partial(both, sharded)).lower(placed, ids, cotangents).compile()
  assert 'all-gather' not in compiled.as_text()
  got = compiled(placed, ids, cotangents)
  one = functools.partial(_run, implementation, update=update)
  want = jax.jit(functools.partial(both, one))(arrays, ids, cotangents)
  _close(got, want)


@implementations
@pytest.mark.parametrize('shared', [(), ('log_decay', 'q', 'base')], ids=['absent', 'replicated'])
def test_shard_map_where_arguments_do_not_vary(implementation, shared):
  """Defaults that the operator makes, and arguments that are the same on all devices."""
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  heads = dict.fromkeys(ARGUMENTS, 2) | {'base': 1}
  arrays = {n: x for n, x in _arrays(_call(B=2, G=4, H=4)).items() if n in ('q', 'k', 'v', *shared)}
  for name in shared:
    arrays[name] = jax.lax.slice_in_dim(arrays[name][:1], 0, 1, axis=heads[name])
  specs = {name: P() if name in shared else P('data', None, 'tensor') for name in arrays}

  def loss(arrays):
    return jnp.sin(_run(implementation, arrays)['o']).sum()

  def on_the_mesh(arrays):
    def shard(arrays):
      return jax.lax.psum(loss(arrays), ('data', 'tensor'))

    return jax.shard_map(shard, mesh=mesh, in_specs=(specs,), out_specs=P())(arrays)

  def on_one_device(arrays):
    for name in shared:
      copies = jnp.repeat(arrays[name], 2, axis=0)
      arrays = arrays | {name: jnp.repeat(copies, 4, axis=heads[name])}
    return loss(arrays)

  got, want = (jax.jit(jax.value_and_grad(f))(arrays) for f in (on_the_mesh, on_one_device))
  _close(got, want)


@pytest.mark.parametrize('implementation', ['reference', 'chunked'])
def test_jit_keeps_batch_and_heads_where_they_are(implementation):
  """Arrays sharded over batch and heads stay so under plain jit: nothing is gathered."""
  call = _call(B=2, G=4, H=4)
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  arrays = {}
  for name, x in _arrays(call).items():
    spec = P('data', 'tensor') if name in ('base', 'residual') else P('data', None, 'tensor')
    arrays[name] = jax.device_put(x, NamedSharding(mesh, spec))
  gradient = jax.jit(jax.grad(functools.partial(_loss, implementation)))
  text = gradient.lower(arrays).compile().as_text()
  assert 'all-gather' not in text
  assert 'all-to-all' not in text


@implementations
def test_eval_shape_allocates_nothing(implementation):
  """A terabyte of values: only shapes are asked for."""
  shape = (1024, 1 << 16, 64, 64)
  x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  gate = jax.ShapeDtypeStruct(shape[:3], jnp.float32)
  operator = functools.partial(ops.residual_delta_rule, implementation=implementation)
  o, state = jax.eval_shape(operator, x, x, x, gate, gate, gate)
  assert (o.shape, o.dtype) == (shape, jnp.bfloat16)
  assert state.base.shape == state.residual.shape == (1024, 64, 64, 64)
  assert state.base.dtype == jnp.float32


@implementations
def test_export_and_reload(implementation, tmp_path):
  """A jitted operator, saved and read back, runs and differentiates."""
  pytest.importorskip('flatbuffers', reason='jax.export saves with flatbuffers')
  arrays = _arrays(_call())
  run = jax.jit(functools.partial(_run, implementation))
  path = tmp_path / 'operator.bin'
  path.write_bytes(jax.export.export(run)(arrays).serialize(vjp_order=1))
  loaded = jax.export.deserialize(bytearray(path.read_bytes()))
  _close(loaded.call(arrays), run(arrays))

  def loss(run, arrays):
    return sum(jnp.sin(x).sum() for x in run(arrays).values())

  got, want = (jax.jit(jax.grad(functools.partial(loss, f)))(arrays) for f in (loaded.call, run))
  _close(got, want, 2e-5)


@pytest.mark.parametrize('name', ['typical', 'channel_decay', 'read_out_sum', 'base_model'])
@pytest.mark.parametrize('update', cases.UPDATES)
def test_second_order_through_the_reference(update, name):
  """First and second derivatives, forward and reverse, against finite differences."""
  call = cases.BY_NAME[name].call(update, B=1, T=4, K=3, V=2, G=1, H=1)
  with jax.enable_x64(True):
    arrays = {n: jnp.asarray(x, jnp.float64) for n, x in call.arrays().items()}

    def run(arrays):
      return harness.outputs(
        harness.OPERATORS[update], arrays, clip=call.clip, readout=call.readout,
        implementation='reference',
      )  # fmt: skip

    check_grads(jax.jit(run), (arrays,), order=2, modes=('fwd', 'rev'), atol=1e-5, rtol=1e-5)


def test_hessian_of_the_other_forms_is_refused_by_name():
  """Their gradient is a closed form; JAX says which function has no forward derivative."""
  arrays = _arrays(_call())
  loss = functools.partial(_loss, 'chunked')
  with pytest.raises(TypeError, match='custom_vjp'):
    jax.jvp(loss, (arrays,), (arrays,))


@implementations
@pytest.mark.parametrize('update', cases.UPDATES)
def test_gradient_direction_of_gate_parameters_in_bfloat16(implementation, update):
  """A_log, dt_bias and the gates' projections, through a bf16 operator: cosine with float64."""
  rng = np.random.default_rng(5)
  B, H, K, D, length = 1, 2, 16, 8, 256
  q, k = rng.normal(size=(2, B, length, H, K))
  # Correlated keys and slow decays: what long contexts meet.
  k = cases.unit(k) + cases.unit(rng.normal(size=(B, 1, H, K)))
  narrow = {'q': cases.unit(q), 'k': cases.unit(k), 'v': rng.normal(size=q.shape)}
  narrow = {name: x.astype(jnp.bfloat16) for name, x in narrow.items()}
  wide = {'x': rng.normal(size=(B, length, D)), 'weight': rng.normal(size=q.shape)}
  parameters = {
    'A_log': np.log(rng.uniform(1, 4, H)), 'dt_bias': rng.normal(size=H) - 3,
    **{name: rng.normal(size=(D, H)) / 3 for name in ('w_decay', 'w_beta', 'w_gamma')},
  }  # fmt: skip

  def loss(p, narrow, wide, implementation):
    x = wide['x']
    log_decay = -jnp.exp(p['A_log']) * jax.nn.softplus(x @ p['w_decay'] + p['dt_bias'])
    gates = (log_decay, jax.nn.sigmoid(x @ p['w_beta']), jax.nn.sigmoid(x @ p['w_gamma']))
    o, _ = harness.OPERATORS[update](
      **narrow, **dict(zip(('log_decay', 'beta', 'gamma'), gates, strict=True)), clip=None,
      implementation=implementation,
    )  # fmt: skip
    return (o.astype(x.dtype) * wide['weight']).sum()

  def gradient(narrow_dtype, wide_dtype, implementation):
    def cast(tree, dtype):
      return jax.tree.map(lambda x: jnp.asarray(x.astype(np.float32), dtype), tree)

    with jax.numpy_rank_promotion('allow'):
      run = jax.jit(jax.grad(functools.partial(loss, implementation=implementation)))
      found = run(cast(parameters, wide_dtype), cast(narrow, narrow_dtype), cast(wide, wide_dtype))
    return {name: np.asarray(x, np.float64) for name, x in found.items()}

  got = gradient(jnp.bfloat16, jnp.float32, implementation)
  with jax.enable_x64(True):
    want = gradient(jnp.float64, jnp.float64, 'reference')
  cosines = {name: harness.cosine(got[name], want[name]) for name in want}
  assert min(cosines.values()) >= 0.999, cosines
