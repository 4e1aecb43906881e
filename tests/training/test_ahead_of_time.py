"""Programs for devices that are not attached: the step, its communication, its arithmetic."""

import functools
import importlib.util

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rla_jax import sharding
from rla_jax.training import ConfigError, ahead_of_time, get_config, gpus, hlo
from rla_jax.training.flops import has_triton, matmul_flops


@pytest.fixture
def mesh():
  return sharding.make_mesh(data=2, fsdp=2, seq=1, tensor=2)


def test_collectives_count_the_rounds_of_loops(mesh):
  """Three rounds of a gather of [16, 32] from 8 parts, and one sum over two devices."""

  def local(x):
    def body(total, _):
      return total + jax.lax.all_gather(jnp.sin(total), mesh.axis_names, tiled=True)[:2], None

    return jax.lax.psum(jax.lax.scan(body, x, length=3)[0], 'tensor')

  mapped = jax.shard_map(
    local, mesh=mesh, in_specs=P(mesh.axis_names), out_specs=P(('data', 'fsdp')), check_vma=False
  )
  x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P(mesh.axis_names)))
  found = hlo.collectives(jax.jit(mapped).lower(x).compile().as_text())
  gather, total = sorted(found, key=lambda x: x.op)
  assert (gather.op, gather.times, gather.group) == ('all-gather', 3, 8)
  assert gather.operands == ('f32[2,32]',)
  assert gather.results == ('f32[16,32]',)
  assert gather.bytes == 16 * 32 * 4
  assert gather.dims == (0,)
  assert (total.op, total.times, total.group, total.bytes) == ('all-reduce', 1, 2, 2 * 32 * 4)


def test_started_halves_are_read_as_whole_ones():
  """As the TPU compiler writes them: tiled layouts, operands beside results, semaphores behind."""
  module = """HloModule jit_f, is_scheduled=true

%cond (p: (s32[], bf16[2,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5), backend_config={"flag_configs":[]}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %x = bf16[2,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %start = (bf16[2,4]{1,0:T(8,128)(2,1)}, bf16[8,4]{1,0:T(8,128)(2,1)}) all-gather-start(%x), \
channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, \
metadata={op_name="jit(f)/gather"}
  %done = bf16[8,4]{1,0} all-gather-done(%start)
}

ENTRY %main (a: bf16[2,4]) -> bf16[2,4] {
  %a = bf16[2,4]{1,0} parameter(0)
  %permute = (bf16[2,4]{1,0}, bf16[2,4]{1,0}, u32[]{:S(2)}) collective-permute-start(%a), \
source_target_pairs={{0,1},{1,0}}
  %kernel.1 = bf16[2,4]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %loop = (s32[], bf16[2,4]) while(%t), condition=%cond, body=%body
}
"""
  gather, permute = sorted(hlo.collectives(module), key=lambda x: x.op)
  assert (gather.times, gather.operands, gather.results) == (5, ('bf16[2,4]',), ('bf16[8,4]',))
  assert (gather.op_name, gather.group) == ('jit(f)/gather', 4)
  assert (permute.times, permute.operands, permute.results) == (1, ('bf16[2,4]',), ('bf16[2,4]',))
  assert [x.name for x in hlo.kernel_calls(module)] == ['kernel.1']


@pytest.mark.parametrize('ids', ['', ', device_ids=([4,2]T(1,0))'])
def test_devices_of_a_mesh_that_communicate(ids):
  text = f"replica_groups=mesh['axis_0'=2,'axis_1'=4]{ids} {{'axis_1'}}, dimensions={{0}}"
  assert hlo.Instruction('gather', 'all-gather', (), (), 1, text).group == 4


def test_a_sum_of_which_each_device_keeps_a_slice_is_a_reduce_scatter():
  """As the TPU compiler fuses it: the all-reduce runs nowhere else."""
  module = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter.9.clone.1 (a: bf16[512,256], b: bf16[256,512]) -> (bf16[512,64], bf16[64,512]) {
  %a = bf16[512,256]{0,1:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-reduce.156 = (bf16[512,256]{0,1:T(8,128)(2,1)}, bf16[256,512]{1,0:T(8,128)(2,1)}) \
all-reduce(%a, %b), channel_id=76, replica_groups={{0,1,2,3}}, to_apply=%add
  %first = bf16[512,256]{0,1:T(8,128)(2,1)} get-tuple-element(%all-reduce.156), index=0
  %own = bf16[512,64]{0,1:T(8,128)(2,1)} dynamic-slice(%first, %zero, %at)
  %second = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.156), index=1
  %its = bf16[64,512]{1,0:T(8,128)(2,1)} dynamic-slice(%second, %at, %zero)
  ROOT %both = (bf16[512,64]{0,1:T(8,128)}, bf16[64,512]{1,0:T(8,128)}) tuple(%own, %its)
}

ENTRY %main (a: bf16[512,256], b: bf16[256,512]) -> bf16[512,64] {
  %a.1 = bf16[512,256]{0,1} parameter(0)
  %b.1 = bf16[256,512]{1,0} parameter(1)
  %f = (bf16[512,64], bf16[64,512]) fusion(%a.1, %b.1), kind=kCustom, \
calls=%all-reduce-scatter.9.clone.1
  ROOT %all-reduce.1 = bf16[512,64]{0,1} all-reduce(%g), channel_id=77, \
replica_groups={{0,1}}, to_apply=%add
}
"""
  scatter, total = hlo.collectives(module)
  assert (scatter.op, scatter.times, scatter.group) == ('reduce-scatter', 1, 4)
  assert scatter.results == ('bf16[512,64]', 'bf16[64,512]')
  assert scatter.bytes == 2 * 512 * 256 * 2
  assert (total.op, total.results) == ('all-reduce', ('bf16[512,64]',))


@pytest.mark.parametrize('shape', ['f32[8,4]{1,0}', '((f32[8,4]{1,0}), f32[8,4]{1,0})'])
def test_a_started_all_reduce_counts_once(shape):
  """As the GPU compilers of two releases write it."""
  module = f"""HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {{
  ROOT %sum = f32[] add(%x, %y)
}}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {{
  %p = f32[8,4]{{1,0}} parameter(0)
  %start = {shape} all-reduce-start(%p), channel_id=2, replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %done = f32[8,4]{{1,0}} all-reduce-done(%start)
}}
"""
  (total,) = hlo.collectives(module)
  assert (total.op, total.times, total.group, total.bytes) == ('all-reduce', 1, 2, 8 * 4 * 4)


def test_flops_of_loops_branches_and_shards(mesh):
  x = jnp.zeros((8, 4))

  def run(x, w):
    def body(y, _):
      return jax.lax.cond(y[0, 0] > 0, lambda y: y @ w @ w, lambda y: y @ w, y), None

    return jax.lax.scan(body, x, length=3)[0]

  jaxpr = jax.make_jaxpr(run)(x, jnp.zeros((4, 4)))
  assert matmul_flops(jaxpr) == 3 * 2 * (2 * 8 * 4 * 4)
  mapped = jax.shard_map(
    run, mesh=mesh, in_specs=(P('data'), P()), out_specs=P('data'), check_vma=False
  )
  # Four devices repeat what each of two does.
  assert matmul_flops(jax.make_jaxpr(mapped)(x, jnp.zeros((4, 4)))) == 4 * matmul_flops(jaxpr)
  unknown = functools.partial(jax.lax.while_loop, lambda y: y[0, 0] > 0, lambda y: y @ y)
  with pytest.raises(ValueError, match='number of rounds'):
    matmul_flops(jax.make_jaxpr(unknown)(jnp.zeros((4, 4))))


def test_triton_kernels_are_noticed_within_loops():
  kernel = jax.extend.core.Primitive('triton_kernel_call')
  kernel.def_abstract_eval(lambda x: x)

  def run(x):
    return jax.lax.scan(lambda y, _: (kernel.bind(y), None), x, length=3)[0]

  assert has_triton(jax.make_jaxpr(run)(jnp.zeros(4)))
  assert not has_triton(jax.make_jaxpr(jnp.sin)(jnp.zeros(4)))


def test_a_step_compiles_from_shapes_alone(mesh):
  config = get_config()
  config.model.update({
    'vocab_size': 32, 'num_layers': 2, 'model_dim': 16, 'ffn_dim': 32, 'num_heads': 2,
    'head_dim': 8, 'dtype': 'float32',
  })  # fmt: skip
  config.data.batch_size, config.data.seq_len = 4, 12
  traced = ahead_of_time.trace_training_step(config, mesh)
  # Projections of a layer: q, k, v, gate, output and the feed-forward; more with gates, the
  # recurrence and what is recomputed. Three products of each in training.
  least = 3 * 2 * 4 * 12 * (2 * (5 * 16 * 16 + 3 * 16 * 32) + 16 * 32)
  assert least < matmul_flops(traced.jaxpr) < 4 * least
  config.model.update({'pattern': ('attention',), 'num_layers': 1, 'remat': 'none'})  # Quicker.
  traced = ahead_of_time.trace_training_step(config, mesh)
  compiled = ahead_of_time.lower(traced, mesh).compile()
  found = hlo.collectives(compiled.as_text())
  assert {x.op for x in found} >= {'all-gather', 'all-reduce'}
  state = compiled.input_shardings[0][0]
  assert state.params['embedding'].spec == P('tensor', 'fsdp')


@pytest.mark.parametrize('topology', ['h300:8', 'h200', 'h200:9', 'h200:2x8', 'h200:8 ', 'gpu'])
def test_gpus_that_nobody_knows_are_refused(topology):
  with pytest.raises(ConfigError, match=r'expected .* as h200:8, of a100, h100, h200'):
    ahead_of_time.described_devices(topology)


@pytest.mark.parametrize('said', ['INVALID_ARGUMENT: TPU v9', 'JAX TPU support not\ninstalled'])
def test_what_libtpu_refuses_is_one_line(said, monkeypatch):
  from jax.experimental import topologies

  def refuse(**kwargs):
    raise RuntimeError(said)

  monkeypatch.setattr(topologies, 'get_topology_desc', refuse)
  with pytest.raises(ConfigError, match=r"topology is 'v9:2x2'; expected .* as v5e:16x16") as error:
    ahead_of_time.described_devices('v9:2x2')
  assert len(str(error.value).splitlines()) == 1


def test_a_compiler_for_gpus_that_is_missing_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"h200:8.* needs .* pip install -e '\.\[cuda\]'"):
    gpus.described_devices('h200:8')
