"""Any mesh gives one device's loss and gradients, and what crosses a split sequence is small."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import sharding
from rla_jax.layers import split
from rla_jax.layers.conv import short_convolution
from rla_jax.models import LanguageModel, ModelConfig
from rla_jax.ops import sequence
from rla_jax.ops.segments import count_segments
from rla_jax.training import hlo
from rla_jax.training.evaluate import loss_sums, to_devices
from rla_jax.training.state import initial_params

ROWS, LENGTH, LONGER, VOCABULARY = 8, 32, 80, 48
HYBRID = 'rdn', 'attention', 'rla', 'sliding_window_attention'


def attention(q, k, v, *, mask, is_causal=False, local_window_size=None, implementation=None):
  """`jax.nn.dot_product_attention` in the type of its inputs; JAX rounds its logits to float32."""
  del implementation
  k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
  age_TS = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None]
  mask = jnp.ones((1, 1, *age_TS.shape), bool) if mask is None else mask
  if is_causal:
    mask &= (age_TS >= 0)[None, None]
  if local_window_size is not None:
    mask &= (age_TS <= local_window_size[0])[None, None]
  logits_BHTS = jnp.einsum('BTHK,BSHK->BHTS', q, k) / q.shape[-1] ** 0.5
  weights_BHTS = jax.nn.softmax(jnp.where(mask, logits_BHTS, -1e30))
  return jnp.einsum('BHTS,BSHK->BTHK', weights_BHTS, v)


@pytest.fixture(scope='module', autouse=True)
def exact_attention():
  """A sum in another order may round a logit otherwise, which would look like an error of 1e-7."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.nn, 'dot_product_attention', attention)
    yield


def model_of(pattern, dtype='float64', **changes):
  """A small model; the plain form of the operators compiles fastest."""
  options = {'implementation': 'reference', 'chunk_size': 8, 'init_std': 0.3, **changes}
  if 'sliding_window_attention' in pattern:
    options['layer_options'] = {'sliding_window_attention': {'window': 5}}
  return LanguageModel(ModelConfig(
    vocab_size=VOCABULARY, num_layers=len(pattern), model_dim=16, ffn_dim=16, pattern=pattern,
    num_heads=4, head_dim=8, dtype=dtype, param_dtype=dtype, **options,
  ))  # fmt: skip


def batch_of(length=LENGTH):
  """Rows of documents that begin anywhere: within shards, at their borders, over several."""
  rng = np.random.default_rng(0)
  starts = rng.random((ROWS, length)) < 0.15
  starts[0] = False
  starts[1] = np.arange(length) % 4 == 0
  tokens, targets = rng.integers(0, VOCABULARY, (2, ROWS, length), np.int32)
  return {
    'tokens': tokens,
    'targets': targets,
    'segment_ids': np.cumsum(starts, axis=1, dtype=np.int32),
    'loss_mask': rng.integers(0, 2, (ROWS, length)).astype(np.float32),
  }


def compiled(model, mesh, length=LENGTH):
  """The compiled loss and gradient, its parameters and batch, where the mesh wants them."""
  init = functools.partial(initial_params, model)
  placed = sharding.shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
  params = jax.jit(init, out_shardings=placed)(jax.random.key(0))
  batch = to_devices(batch_of(length), mesh)
  function = jax.value_and_grad(functools.partial(loss_sums, model), has_aux=True)
  jitted = jax.jit(function, out_shardings=(None, placed))
  return jitted.lower(params, batch).compile(), params, batch


def loss_and_gradient(model, length=LENGTH, **sizes):
  """On a mesh of these sizes; on one device without any."""
  mesh = sharding.make_mesh(**sizes, devices=None if sizes else jax.devices()[:1])
  with jax.set_mesh(mesh):
    step, params, batch = compiled(model, mesh, length)
    return jax.device_get(step(params, batch))


def largest_error(got, want):
  """RMS of the error over that of the reference, of the worst array."""
  def error(x, y):
    return np.sqrt(np.mean((x - y) ** 2) / max(np.mean(y**2), 1e-30))

  # NaN if there is one, unlike max.
  return np.max([*map(error, jax.tree.leaves(got), jax.tree.leaves(want))])


@functools.cache
def on_one_device(pattern, dtype='float64', loss_chunk=None):
  return loss_and_gradient(model_of(pattern, dtype, loss_chunk=loss_chunk))


def slow(sizes):
  return pytest.param(sizes, marks=pytest.mark.slow)


@pytest.fixture(scope='module')
def divided():
  """An RDN on halves of parameters, sequence and heads: program, result, that of one device."""
  with jax.enable_x64(True):
    model = model_of(('rdn',), loss_chunk=16, remat='none')
    mesh = sharding.make_mesh(data=1, fsdp=2, seq=2, tensor=2)
    with jax.set_mesh(mesh):
      step, params, batch = compiled(model, mesh, LONGER)
      got = jax.device_get(step(params, batch))
    return step.as_text(), got, loss_and_gradient(model_of(('rdn',), remat='none'), LONGER)


def test_a_mesh_gives_one_device_s_loss_and_gradient(divided):
  _, got, want = divided
  assert largest_error(got, want) < 1e-12


@pytest.mark.parametrize('sizes', [
  slow({'data': 2, 'seq': 2, 'tensor': 2}),
  slow({'data': 8}),
  slow({'data': 1, 'fsdp': 8}),
  slow({'data': 2, 'tensor': 4}),
  slow({'data': 1, 'seq': 8}),
  slow({'data': 1, 'fsdp': 2, 'seq': 4}),
  slow({'data': 1, 'fsdp': 2, 'seq': 2, 'tensor': 2}),
], ids=str)  # fmt: skip
def test_hybrids_on_every_mesh(sizes):
  with jax.enable_x64(True):
    got = loss_and_gradient(model_of(HYBRID), **sizes)
    assert largest_error(got, on_one_device(HYBRID)) < 1e-12


@pytest.mark.parametrize('layer', ['mamba2', 'kda', 'two_state', 'retnet', 'gla'])
@pytest.mark.slow
def test_every_layer_splits(layer):
  """Shared key heads, a decay a channel, doubled heads, rotary positions, no convolution."""
  with jax.enable_x64(True):
    got = loss_and_gradient(model_of((layer,)), data=2, seq=2, tensor=2)
    assert largest_error(got, on_one_device((layer,))) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [{'data': 2, 'seq': 4}, {'data': 2, 'seq': 2, 'tensor': 2}], ids=str
)
def test_heads_are_exchanged_for_tokens(sizes):
  with jax.enable_x64(True):
    got = loss_and_gradient(model_of(HYBRID, exchange_heads=True), **sizes)
    assert largest_error(got, on_one_device(HYBRID)) < 1e-12


@pytest.mark.slow
def test_float32_and_losses_in_chunks():
  # Weights as above multiply rounding: one device alone is then up to 2e-5 off its float64 result.
  options = {'dtype': 'float32', 'implementation': 'chunked', 'init_std': 0.1}
  got = loss_and_gradient(model_of(HYBRID, loss_chunk=6, **options), data=2, seq=4)
  assert largest_error(got, loss_and_gradient(model_of(HYBRID, **options))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('broken', ['states', 'halo'])
def test_a_broken_exchange_is_noticed(broken, monkeypatch):
  """The comparison above can fail: it does if states or the convolution start anew at a border."""
  if broken == 'states':
    monkeypatch.setattr(sequence, '_exclusive', lambda own, initial, axis: jnp.zeros_like(initial))
  else:
    monkeypatch.setattr(split, '_halo', lambda h, width, ids, axis: jnp.zeros_like(h[:, 1:width]))
  with jax.enable_x64(True):
    got = loss_and_gradient(model_of(('rla',)), data=4, seq=2)
    assert largest_error(got, on_one_device(('rla',))) > 1e-3


def collectives(text):
  """(name, shapes of the result) of every collective of a compiled program."""
  names = 'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter'
  found = re.findall(rf'= (.*?) ({names})(?:-start)?\(', text)
  return [
    (name, [[int(d) for d in x.split(',') if d] for x in re.findall(r'\[([\d,]*)\]', shapes)])
    for shapes, name in found
  ]


def test_only_states_cross_a_split_sequence(divided):
  """Neither tokens nor heads are gathered."""
  found = collectives(divided[0])
  assert {name for name, _ in found} >= {'all-gather', 'all-reduce', 'collective-permute'}
  heads, size, rows = 4 // 2, 8, ROWS // 2
  for name, shapes in found:
    assert name != 'all-to-all'
    for shape in shapes:
      if name == 'all-gather':
        assert np.prod(shape, dtype=int) <= 2 * rows * heads * size**2, shape
      # Products with split weights are summed, every token where it is.
      tokens = {LONGER} if name == 'all-reduce' else {LONGER, LONGER // 2}
      assert not tokens & set(shape), (name, shape)


def test_chunks_of_the_loss_share_one_copy_of_the_head(divided):
  """Gathered once, its gradient summed once, however many chunks there are."""
  kernel = 16, VOCABULARY // 2
  found = [x for x in hlo.collectives(divided[0])
           if kernel in [hlo.sizes(shape)[-2:] for shape in x.operands + x.results]]  # fmt: skip
  assert {x.op for x in found} == {'all-gather', 'all-reduce'}  # CPU has no reduce-scatter.
  assert [x.times for x in found] == [1] * len(found), found


@pytest.mark.parametrize('broken', [False, True])
def test_convolutions_reach_over_the_border_within_documents(broken, monkeypatch):
  if broken:
    monkeypatch.setattr(split, '_halo', lambda h, width, ids, axis: jnp.zeros_like(h[:, 1:width]))
  rng = np.random.default_rng(0)
  x, taps = rng.normal(size=(ROWS, LENGTH, 4)), rng.normal(size=(4, 4))
  ids = batch_of()['segment_ids']
  want = short_convolution(jnp.asarray(x), jnp.asarray(taps), count_segments(jnp.asarray(ids)))

  def function(h, taps, documents, tail, positions):
    return short_convolution(h, taps, documents, tail)[:, :, None]

  with jax.set_mesh(sharding.make_mesh(data=1, seq=8)):
    division = split.divide(ROWS, LENGTH)
    got = jax.jit(lambda *args: division.head_inputs(function, 1, *args))(
      x, taps, ids, None, np.arange(LENGTH)
    )
  close = np.allclose(got[:, :, 0], want, atol=1e-5)
  assert close != broken


def test_a_mesh_that_does_not_divide_the_sequence_is_refused():
  mesh = sharding.make_mesh(data=1, seq=8)
  with jax.set_mesh(mesh), pytest.raises(ValueError, match='12 tokens'):
    split.divide(1, 12)
