"""A sequence split over devices: the same values and gradients as on one, and nothing gathered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from rla_jax import ops
from rla_jax.ops import sequence
from tests.ops import harness

SHARDS = 8
RDN, RLA = ops.residual_delta_rule, ops.residual_linear_attention


def example(channel=False, residual=True, segments=False, dtype=np.float64):
  """Arguments, initial state, ids and cotangents of a sequence of 64 tokens."""
  rng = np.random.default_rng(0)
  B, T, G, H, K, V = 2, 64, 1, 2, 4, 6
  q, k = rng.normal(size=(2, B, T, G, K))
  k /= np.linalg.norm(k, axis=-1, keepdims=True)
  v = rng.normal(size=(B, T, H, V))
  log_decay = -0.1 * rng.exponential(size=(B, T, H, K) if channel else (B, T, H))
  beta, gamma = rng.uniform(size=(2, B, T, H))
  base, extra = rng.normal(size=(2, B, H, K, V))
  cotangents = rng.normal(size=(3, B, T, H, V))
  if not residual:
    gamma = extra = None
  ids = None
  if segments:
    # Documents that start within a shard, at a border of shards, and that span several.
    ids = np.zeros((B, T), np.int32)
    for row, starts in enumerate(([3, 4, 20, 32, 63], [8, 40])):
      for start in starts:
        ids[row, start:] += 1
  cast = lambda x: None if x is None else jnp.asarray(x, dtype)  # noqa: E731
  args = tuple(map(cast, (q, k, v, log_decay, beta, gamma)))
  return args, ops.ResidualState(cast(base), cast(extra)), ids, cast(cotangents)


def run(operator, example, shards=None, readout='gated', by=ops.split_over_sequence):
  """(o, state) and the gradients by all arrays, on one device or on so many."""
  args, state, ids, cotangents = example
  options = {'readout': readout, 'implementation': 'chunked', 'chunk_size': 16}

  def loss(args, state):
    if shards is None:
      o, final = operator(*args, initial_state=state, segment_ids=ids, **options)
    else:
      o, final = split(operator, shards, by, **options)(args, state, ids)
    total = (o * cotangents[0]).sum()
    for state, weights in zip(jax.tree.leaves(final), cotangents[1:], strict=False):
      total += (state * weights[:, 0, :, None, :]).sum()
    return total, (o, final)

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(args, state)


def split(operator, shards, by=ops.split_over_sequence, **options):
  mesh = Mesh(np.array(jax.devices()[:shards]), ('seq',), axis_types=(AxisType.Auto,))
  tokens, whole = PartitionSpec(None, 'seq'), PartitionSpec()

  def local(args, state, ids):
    return by(
      operator, *args, axis_name='seq', initial_state=state, segment_ids=ids, **options
    )

  return jax.shard_map(
    local, mesh=mesh, in_specs=(tokens, whole, tokens), out_specs=(tokens, whole), check_vma=False
  )


def largest_error(got, want):
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  return np.max([harness.error(x, y) for x, y in pairs])  # NaN if there is one, unlike max


@pytest.mark.parametrize(
  'operator, options, readout, shards',
  [
    (RDN, {'segments': True}, 'gated', SHARDS),
    (RLA, {'segments': True, 'channel': True}, 'sum', 4),
    (RDN, {'residual': False}, 'gated', 2),
  ],
)
def test_equals_one_device_in_float64(operator, options, readout, shards):
  with jax.enable_x64(True):
    case = example(**options)
    want = run(operator, case, None, readout)
    assert largest_error(run(operator, case, shards, readout), want) < 1e-12


@pytest.mark.parametrize('operator', [pytest.param(RDN, marks=pytest.mark.slow), RLA])
def test_scan_of_logarithmic_depth_equals_one_device(operator, monkeypatch):
  with jax.enable_x64(True):
    case = example(segments=True)
    monkeypatch.setattr(sequence, '_GATHERED_SHARDS', 1)
    assert largest_error(run(operator, case, SHARDS), run(operator, case)) < 1e-12


@pytest.mark.parametrize('gathered', [1, 8], ids=['scan', 'gather'])
@pytest.mark.parametrize('shards', [1, 2, 3, 5, 6, 7])
def test_states_before_any_number_of_shards(shards, gathered, monkeypatch):
  monkeypatch.setattr(sequence, '_GATHERED_SHARDS', gathered)
  rng = np.random.default_rng(shards)
  maps = sequence.ShardMap(
    rng.random((shards, 2, 1, 1, 1)) < 0.7,
    *(rng.normal(size=(shards, 2, 1, 3, n)).astype(np.float32) for n in (3, 4)),
  )
  state = initial = rng.normal(size=(2, 1, 3, 4)).astype(np.float32)
  want = []
  for through, matrix, offset in zip(*maps):
    want.append(state)
    state = np.where(through, matrix @ state, 0) + offset

  def local(maps):
    own = jax.tree.map(lambda x: x[0], maps)
    return sequence._exclusive(own, jnp.asarray(initial), 'seq')[None]

  mesh = Mesh(np.array(jax.devices()[:shards]), ('seq',), axis_types=(AxisType.Auto,))
  split = PartitionSpec('seq')
  mapped = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
  np.testing.assert_allclose(jax.jit(mapped)(maps), np.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('operator', [pytest.param(RDN, marks=pytest.mark.slow), RLA])
def test_exchange_of_heads_has_the_same_value(operator):
  """The other mode as oracle: initial and final states, documents anywhere, one shared key head."""
  with jax.enable_x64(True):
    case = example(segments=True)
    want = run(operator, case)
    assert largest_error(run(operator, case, 2, by=ops.split_over_heads), want) < 1e-12


def test_a_state_that_is_reset_at_the_border_is_noticed(monkeypatch):
  """The comparison above can fail: without the exchange of R alone it does."""
  case = example(dtype=np.float32)
  exchange = sequence._exclusive
  calls = []

  def broken(own, initial, axis_name):
    calls.append(1)
    state = exchange(own, initial, axis_name)
    return state if len(calls) % 2 else jnp.zeros_like(state)

  monkeypatch.setattr(sequence, '_exclusive', broken)
  assert largest_error(run(RLA, case, SHARDS), run(RLA, case)) > 1e-2


@pytest.mark.parametrize('argument', ['v', 'log_decay'])
def test_broken_document_stays_alone(argument):
  """Over shards too: row 0's document of tokens 20 to 31, which lies in two of them."""
  args, state, ids, cotangents = example(segments=True, dtype=np.float32)
  clean = run(RLA, (args, state, ids, cotangents), SHARDS)
  broken = list(args)
  place = ('q', 'k', 'v', 'log_decay').index(argument)
  broken[place] = args[place].at[0, 22].set(jnp.nan)
  got = run(RLA, (tuple(broken), state, ids, cotangents), SHARDS)
  keep = np.ones((2, 64), bool)
  keep[0, 20:32] = False
  (_, (o, final)), (d_args, d_state) = got
  (_, (o_clean, final_clean)), (d_args_clean, d_state_clean) = clean
  assert np.isnan(np.asarray(o)[0, 22:32]).all()
  for x, y in zip((o, *d_args), (o_clean, *d_args_clean), strict=True):
    assert harness.error(np.asarray(x)[keep], np.asarray(y)[keep]) < 1e-5
  assert largest_error((final, d_state), (final_clean, d_state_clean)) < 1e-5


def test_no_token_leaves_its_device():
  """Every collective moves arrays of the size of states: none has a time axis."""
  args, state, ids, _ = example(dtype=np.float32)

  def total(args, state):
    o, final = split(RDN, SHARDS, implementation='chunked')(args, state, ids)
    return (o**2).sum() + (final.base**2).sum()

  text = jax.jit(jax.grad(total)).lower(args, state).compile().as_text()
  collectives = re.findall(r'= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|'
                           r'reduce-scatter)(?:-start)?\(', text)  # fmt: skip
  assert collectives
  B, H, K, V = state.base.shape
  largest = SHARDS * B * H * max(K * K, K * V)
  for shapes, name in collectives:
    for dimensions in re.findall(r'\[([\d,]*)\]', shapes):
      size = np.prod([int(d) for d in dimensions.split(',') if d], dtype=int)
      assert size <= largest < args[2].size, (name, shapes)


@pytest.mark.parametrize('shards', [2])
def test_errors(shards):
  args, state, ids, _ = example(dtype=np.float32)
  with pytest.raises(ValueError, match='expected one of the two operators'):
    split(lambda: None, shards)(args, state, ids)
  empty = tuple(x[:, :0] for x in args)
  with pytest.raises(ValueError, match='at least one token on every shard'):
    split(RDN, shards)(empty, state, None)
  with pytest.raises(ValueError, match='2 heads, which mesh axis seq of size 4 does not divide'):
    split(RDN, 4, ops.split_over_heads)(args, state, ids)
