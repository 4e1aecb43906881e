"""Around the Triton kernels: interpreter, launcher, cache, vmap, many devices, block sizes."""

import contextlib
import dataclasses
import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip('triton')

import triton
import triton.language as tl
from jax.sharding import NamedSharding, PartitionSpec

from rla_jax.kernels.residual.gpu import (
  batching,
  blocks,
  call,
  candidates,
  launch,
  partition,
  step,
)
from tests.kernels import triton_harness as harness

COLLECTIVES = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute')


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
  return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def product_kernel(a_ptr, b_ptr, count, o_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
  program = tl.program_id(0).to(tl.int64)
  i = tl.arange(0, SIZE)
  offsets = program * SIZE * SIZE + i[:, None] * SIZE + i[None, :]
  a = tl.load(a_ptr + offsets)
  b = tl.load(b_ptr + offsets)
  total = tl.zeros([SIZE, SIZE], dtype=tl.float32)
  for _ in range(0, count):
    total += _product(a, b, PRECISION)
  tl.store(o_ptr + offsets, total.to(o_ptr.dtype.element_ty))


@triton.jit
def half_kernel(x_ptr, o_ptr, SIZE: tl.constexpr):
  """Writes every second element only."""
  i = 2 * tl.arange(0, SIZE)
  tl.store(o_ptr + i, tl.load(x_ptr + i))


# --- interpreter ---


@pytest.mark.parametrize('dtype', [ml_dtypes.bfloat16, np.float16, np.float32])
def test_interpreter_rounds_once(dtype):
  """16-bit operands are multiplied exactly, summed in float32, rounded to nearest even."""
  a, b = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(dtype)
  o = np.full((3, 32, 32), np.nan, dtype)
  harness.run(product_kernel, (3,), a, b, 2, o, SIZE=32, PRECISION='ieee', num_warps=4)
  exact = 2 * (a.astype(np.float32) @ b.astype(np.float32))
  if dtype == np.float32:
    np.testing.assert_allclose(o, exact, rtol=1e-5, atol=1e-5)
  else:
    units = np.abs(o.view(np.int16).astype(int) - exact.astype(dtype).view(np.int16).astype(int))
    assert units.max() <= 1  # of the last place: the order of the sum may decide a tie
    assert np.mean(units > 0) < 0.01


def test_interpreter_shows_what_tf32_loses():
  a, b = np.random.default_rng(0).normal(size=(2, 1, 32, 32)).astype(np.float32)
  errors = {}
  for precision in ('ieee', 'tf32x3', 'tf32'):
    o = np.full_like(a, np.nan)
    harness.run(product_kernel, (1,), a, b, 1, o, SIZE=32, PRECISION=precision)
    wanted = a.astype(np.float64) @ b.astype(np.float64)
    errors[precision] = np.sqrt(np.mean((o - wanted) ** 2) / np.mean(wanted**2))
  assert errors['ieee'] < 1e-6
  assert errors['tf32x3'] < 1e-6
  assert 1e-4 < errors['tf32'] < 1e-3


def test_unwritten_output_shows():
  call_ = functools.partial(launch.launch, half_kernel, grid=(1,), num_warps=1, num_stages=1)
  x = jnp.arange(16, dtype=jnp.float32)
  o = call_(x, out_shape=jax.ShapeDtypeStruct((16,), jnp.float32), SIZE=8, interpret=True)
  np.testing.assert_array_equal(o[::2], x[::2])
  assert np.isnan(o[1::2]).all()


# --- launcher ---


@pytest.mark.parametrize(
  ('inputs', 'constexprs', 'message'),
  [
    (1, {'SIZE': 16, 'PRECISION': 'ieee'}, 'got 3 arrays and scalars, expected 4'),
    (2, {'SIZE': 16}, r"got the constexprs \['SIZE'\], expected \['PRECISION', 'SIZE'\]"),
    (2, {'SIZE': 16, 'PRECISON': 'ieee'}, 'PRECISON'),
  ],
)
def test_launch_checks_its_arguments(inputs, constexprs, message):
  """jax-triton alone would take a misspelled argument for a compile-time parameter."""
  arrays = [jnp.zeros((16, 16))] * inputs
  with pytest.raises(TypeError, match=message):
    launch.launch(
      product_kernel, *arrays, 1, out_shape=arrays[0], grid=(1,), num_warps=4, num_stages=1,
      interpret=True, **constexprs,
    )  # fmt: skip


@pytest.mark.parametrize(
  ('kind', 'expected'),
  [('NVIDIA A100-SXM4-80GB', False), ('NVIDIA H200', True), ('a CPU that nobody knows', False)],
)
def test_hopper_is_known_by_its_name(kind, expected, monkeypatch):
  monkeypatch.setattr(launch, 'device_kind', lambda: kind)
  assert launch.is_hopper() == expected


@pytest.mark.parametrize(
  ('capability', 'expected'), [('9.0', True), ('10.0', True), ('12.0', False)]
)
def test_hopper_is_known_by_its_capability(capability, expected, monkeypatch):
  device = types.SimpleNamespace(device_kind='new', compute_capability=capability)
  monkeypatch.setattr(launch.jax, 'devices', lambda: [device])
  assert launch.is_hopper() == expected


def test_compiled_kernels_are_kept_on_disk(tmp_path):
  """A second process finds what the first compiled; another kernel or option does not hit it."""
  compiled = []

  def library():
    def compile_ttir_inplace(ttir, backend, options, compute_capability, platform):
      compiled.append((ttir, options))
      return types.SimpleNamespace(binary=f'ptx of {ttir}', shared_mem_bytes=options)

    found = types.SimpleNamespace(
      compile_ttir_inplace=compile_ttir_inplace, CompilationResult=types.SimpleNamespace
    )
    launch._keep_compiled_kernels(found)
    return found

  arguments = ('kernel a', None, 3, 90, 'cuda')
  library().compile_ttir_inplace(*arguments)
  library().compile_ttir_inplace(*arguments)
  assert len(compiled) == 2  # no folder is set
  with _compilation_cache(tmp_path):
    first = library().compile_ttir_inplace(*arguments)
    again = library().compile_ttir_inplace(*arguments)
    assert len(compiled) == 3
    assert vars(first) == vars(again)
    assert again.binary == 'ptx of kernel a'
    library().compile_ttir_inplace('kernel b', *arguments[1:])
    library().compile_ttir_inplace('kernel a', None, 4, 90, 'cuda')
    library().compile_ttir_inplace('kernel a', None, 3, 80, 'cuda')
    assert len(compiled) == 6


@contextlib.contextmanager
def _compilation_cache(folder):
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', str(folder))
  try:
    yield
  finally:
    jax.config.update('jax_compilation_cache_dir', before)


def test_package_imports_without_triton():
  """`unsupported` answers where Triton is not installed."""
  program = """
import sys
sys.modules['triton'] = sys.modules['jax_triton'] = None
from rla_jax.kernels.residual import gpu
size = {'key_dim': 64, 'value_dim': 64, 'dtype': 'bfloat16'}
options = {'update': 'delta', 'channel_decay': False, 'readout': 'gated', 'residual': True}
assert gpu.unsupported(**size, **options) is None
"""
  subprocess.run([sys.executable, '-c', program], check=True)


def test_lowers_for_cuda(monkeypatch):
  """The whole way through jax-triton to a CUDA program; it needs JAX's CUDA plugin but no GPU."""
  try:
    from jax_triton import triton_lib
  except ImportError as error:  # jax-triton wants the plugin when it is imported
    pytest.skip(f"jax-triton, or JAX's CUDA plugin, is not installed: {error}")
  library = triton_lib.triton_kernel_call_lib
  if not hasattr(library, 'get_compute_capability'):  # so newer ones say it
    pytest.skip("JAX's CUDA plugin is not installed")
  monkeypatch.setattr(library, 'get_compute_capability', lambda device: 90)
  shapes = [(2, 4, 64)] * 3 + [(2, 4)] * 3 + [(2, 4, 64, 64)] * 2
  inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  options = {'update': 'delta', 'clip': 1.0, 'readout': 'gated'}
  program = jax.jit(functools.partial(step.residual_attention_step, **options)).trace(*inputs)
  text = program.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('@triton_kernel_call') == 1
  # Both states are updated in place.
  assert text.count('stablehlo.output_operand_alias') == 2


# --- vmap ---


def test_vmap_folds_into_the_batch():
  seen = []

  def function(x_BK, y_B, nothing):
    assert nothing is None
    seen.append(x_BK.shape)
    return x_BK * y_B[:, None], None

  call_ = batching.fold_into_batch(function)
  x = jnp.arange(24.0).reshape(2, 3, 4)
  y = jnp.arange(3.0)
  o, none = jax.vmap(call_, in_axes=(0, None, None))(x, y, None)
  assert none is None
  np.testing.assert_array_equal(o, x * y[None, :, None])
  twice = jax.vmap(jax.vmap(call_, in_axes=(0, None, None)), in_axes=(0, 0, None))
  o, _ = twice(jnp.stack([x, 2 * x]), jnp.stack([y, y + 1]), None)
  np.testing.assert_array_equal(o[1], 2 * x * (y + 1)[None, :, None])
  assert seen[-1] == (12, 4)


# --- many devices ---


def _mesh():
  auto = (jax.sharding.AxisType.Auto,) * 2
  return jax.make_mesh((4, 2), ('data', 'tensor'), axis_types=auto)


def _step_inputs(G, B=8, H=4, K=16, V=32):
  rng = np.random.default_rng(0)
  shapes = [(B, G, K)] * 2 + [(B, H, V)] + [(B, H)] * 3 + [(B, H, K, V)] * 2
  inputs = [jnp.asarray(rng.normal(size=s).astype(np.float32)) for s in shapes]
  inputs[3] = -jnp.abs(inputs[3])
  keys = PartitionSpec('data', 'tensor' if G % 2 == 0 else None)
  specs = [keys] * 2 + [PartitionSpec('data', 'tensor')] * 6
  mesh = _mesh()
  placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(inputs, specs, strict=True)]
  return inputs, placed


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_partitioned_call_gathers_nothing(groups):
  """The step kernel over data and heads: no collective in the program; without the rule, many."""
  _, placed = _step_inputs(groups)
  options = {'update': 'delta', 'clip': 1.0, 'readout': 'gated', 'interpret': True}
  ruled = functools.partial(step.residual_attention_step, **options)
  bare = functools.partial(step._launch, **options)
  program = jax.jit(ruled).lower(*placed).compile()
  assert not [c for c in COLLECTIVES if c in program.as_text()]
  for sharding in program.output_shardings:
    assert sharding.spec == PartitionSpec('data', 'tensor')
  assert 'all-gather' in jax.jit(bare).lower(*placed).compile().as_text()


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_partitioned_call_is_right(groups):
  """Each device computes its own heads of its own sequences."""
  inputs, placed = _step_inputs(groups)
  plain = functools.partial(step.plain_step, update='delta', clip=1.0, readout='gated')
  ruled = partition.over_batch_and_heads(plain, step.INPUTS, step.OUTPUTS)
  for x, y in zip(jax.jit(ruled)(*placed), plain(*inputs), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_inside_shard_map():
  inputs, _ = _step_inputs(4)
  options = {'update': 'additive', 'clip': None, 'readout': 'gated'}
  run = functools.partial(step.residual_attention_step, interpret=True, **options)
  spec = PartitionSpec('data', 'tensor')
  sharded = jax.jit(jax.shard_map(run, mesh=_mesh(), in_specs=spec, out_specs=spec))
  for x, y in zip(sharded(*inputs), step.plain_step(*inputs, **options), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('G', [1, 2, 4])
def test_training_step_gathers_nothing(G):
  """Forward and backward kernels under jit over a mesh; one key's gradient is summed over it."""
  B, T, H, K = 8, 32, 4, 16
  config = call.Config(True, True, 1.0, harness.small_blocks(), True)
  mesh = _mesh()

  def shaped(shape, *spec):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  keys, gates = ((B, T, n) for n in (G, H))
  tokens = [shaped((*s, K), 'data', None, 'tensor' if s[2] > 1 else None)
            for s in (keys, keys, gates)]  # fmt: skip
  tokens += [shaped(gates, 'data', None, 'tensor')] * 3
  states = [shaped((B, H, K, K), 'data', 'tensor')] * 2

  def both(cotangents, *inputs):
    outputs, pullback = jax.vjp(lambda *x: call.attend(config, *x, None), *inputs)
    return outputs, pullback(cotangents)

  program = jax.jit(both).lower((tokens[2], *states), *tokens, *states).compile()
  found = [c for c in COLLECTIVES if c in program.as_text()]
  assert found == (['all-reduce'] if G == 1 else [])
  for sharding in jax.tree.leaves(program.output_shardings):
    assert sharding.spec[0] == 'data' and ('tensor' in sharding.spec or G == 1)


# --- block sizes ---


@pytest.mark.parametrize(
  ('programs', 'spans', 'fill', 'parts'),
  [
    (32, 512, 2, 8),  # 16 heads of 128, 32768 tokens
    (32, 512, 4, 16),
    (32, 64, 2, 8),
    (32, 48, 2, 6),
    (32, 32, 2, 4),
    (32, 16, 2, 1),  # too short
    (66, 512, 2, 4),
    (67, 512, 2, 1),  # more than half of the card is busy
    (512, 32, 4, 1),
    (4, 4096, 2, 66),
    (4, 4096, 0, 1),
  ],
)
def test_few_programs_split_the_sequence(programs, spans, fill, parts):
  assert blocks.sequence_split(programs, spans, fill=fill) == parts


@pytest.mark.parametrize('thorough', [False, True])
@pytest.mark.parametrize('part', candidates.PARTS)
def test_candidates_differ_in_one_part(part, thorough):
  current = dataclasses.replace(harness.small_blocks(), pair=blocks.Kernel(16, 1, 2))
  found = candidates.candidates(current, part, 64, thorough=thorough)
  assert found[0] == current and len(set(found)) == len(found) > 1
  for chosen in found[1:]:
    changed = {n for n in vars(chosen) if getattr(chosen, n) != getattr(current, n)}
    assert changed <= ({'chunk', 'span'} if part == 'chunk' else {part})
    assert getattr(getattr(chosen, part, None), 'value', 0) <= 64
  assert blocks.Blocks.from_json(dataclasses.asdict(found[-1])) == found[-1]


@pytest.mark.parametrize('size', [128, 256])
@pytest.mark.parametrize('length', [512, 8192])
@pytest.mark.parametrize('delta', [True, False])
def test_candidates_are_records_that_a_call_takes(delta, length, size):
  """Of two states, both of them in one program among them."""
  current = blocks.heuristic(
    delta=delta, residual=True, key_dim=size, value_dim=size, dtype='bfloat16', heads=32,
    length=length,
  )  # fmt: skip
  found = [c for part in candidates.PARTS for c in candidates.candidates(current, part, size)]
  for chosen in found:
    call.Config(delta, True, 1.0, chosen, True)
  heads = {'value_dim': size, 'heads': 512, 'split': 1}
  assert 'both' in {blocks.walk_of(chosen, **heads) for chosen in found}
