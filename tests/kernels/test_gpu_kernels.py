"""The Triton kernels without a GPU: numerics in the interpreter.

Everything is held against the recurrence in float64, token by token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('triton')

import triton
import triton.language as tl

from rla_jax.kernels.residual import gpu
from rla_jax.kernels.residual.gpu import blocks, call, forward_pass
from rla_jax.kernels.residual.gpu.handover import take_turn
from tests.errors import cosine, error
from tests.kernels import triton_harness as harness
from tests.oracle import GRADIENTS, Call, gradients, recurrence

# RMS(error) / RMS(reference): outputs and states, gradients of tensors, gradients of gates.
BARS = {'float32': (2e-5, 2e-5, 2e-5), 'bfloat16': (0.005, 0.008, 0.02)}
BARS['float16'] = BARS['bfloat16']
GATES = ('log_decay', 'beta', 'gamma')


@dataclasses.dataclass(frozen=True)
class Case:
  """A problem. `hard`: strengths of 1, no decay and keys alike, as of repeated tokens.

  `common`: share of one direction in all keys. `gates`: what all strengths are. `extreme`: gates of
  0, next to nothing, 1 and below 0, side by side. `looped`: as with eight warps where there is no
  wgmma.
  """

  update: str = 'delta'
  residual: bool = True
  dtype: str = 'float32'
  B: int = 1
  T: int = 96
  G: int = 1
  H: int = 1
  K: int = 16
  V: int = 16
  clip: float | None = 1.0
  segments: bool = False
  resets: bool = False
  hard: bool = False
  common: float = 0.0
  gates: float | None = None
  extreme: bool = False
  chunk_size: int | None = None
  pieces: int = 1
  split: int | None = None
  walk: str | None = None
  looped: bool = False


CASES = {
  'delta': Case(),
  'additive': Case(update='additive'),
  'delta, base alone': Case(residual=False, T=64),
  'additive, base alone': Case(update='additive', residual=False, T=64),
  'one token': Case(T=1),
  'no clip, grouped heads, odd sizes': Case(clip=None, G=2, H=4, K=20, V=24, T=63),
  'segments, resets, pieces': Case(B=2, T=150, segments=True, resets=True, pieces=3),
  'additive, segments, resets': Case(update='additive', T=75, segments=True, resets=True),
  'hard': Case(hard=True, T=130, chunk_size=32),
  'hard, chunk 64': Case(hard=True, T=130, chunk_size=64),
  'bfloat16': Case(dtype='bfloat16', T=128, K=32, V=32),
  'bfloat16, additive': Case(dtype='bfloat16', update='additive', T=128, K=32, V=32),
  'bfloat16, keys alike': Case(dtype='bfloat16', T=256, K=128, V=128, common=0.9),
  'bfloat16, keys alike, base alone': Case(
    dtype='bfloat16', T=256, K=128, V=128, common=0.9, residual=False
  ),
  # An inverse that grows, in both signs.
  'bfloat16, keys alike, gates below 0': Case(
    dtype='bfloat16', T=64, K=32, V=32, common=0.9, gates=-0.3, clip=None
  ),
  'float16, keys alike, gates of 1': Case(
    dtype='float16', T=128, K=32, V=32, common=0.9, gates=1.0
  ),
  'float16': Case(dtype='float16', K=32, V=32),
  'bfloat16, odd sizes, grouped heads, segments, resets, pieces': Case(
    dtype='bfloat16', H=2, K=20, V=40, T=150, segments=True, resets=True, pieces=2
  ),
  'extreme gates, K < V, pieces': Case(K=16, V=40, T=100, extreme=True, pieces=2),
  'extreme gates, additive': Case(update='additive', T=100, extreme=True, pieces=2),
  'extreme gates, bfloat16': Case(dtype='bfloat16', K=32, V=32, T=100, extreme=True),
  'extreme gates, float16': Case(dtype='float16', K=32, V=32, T=100, extreme=True),
  'extreme gates, float16, additive': Case(
    dtype='float16', update='additive', K=32, V=32, T=100, extreme=True
  ),
  'bfloat16, odd sizes, chunk 16': Case(dtype='bfloat16', K=20, V=40, T=75, chunk_size=16),
  'bfloat16, odd sizes, chunk 64': Case(dtype='bfloat16', K=20, V=40, T=75, chunk_size=64),
  # Parts of 32 tokens, so that segments start at a part's first token and elsewhere.
  'split, segments, resets': Case(T=129, segments=True, resets=True, split=5),
  'split, additive, segments, resets': Case(
    update='additive', T=129, segments=True, resets=True, split=5
  ),
  'paired, segments, resets': Case(
    B=2, T=150, V=40, segments=True, resets=True, pieces=2, walk='pair'
  ),
  'paired, no clip, bfloat16, grouped heads, odd sizes': Case(
    dtype='bfloat16', clip=None, G=2, H=4, K=20, V=24, T=63, walk='pair'
  ),
  'paired, bfloat16, tight clip, keys alike': Case(
    dtype='bfloat16', clip=0.25, K=32, V=40, T=330, common=0.9, walk='pair'
  ),
  'paired, float16, extreme gates': Case(
    dtype='float16', K=32, V=32, T=100, extreme=True, walk='pair'
  ),
  'apart, segments, resets': Case(
    T=129, V=40, segments=True, resets=True, split=5, walk='apart'
  ),
  'apart, no clip, bfloat16, grouped heads, odd sizes, pieces': Case(
    dtype='bfloat16', clip=None, B=2, G=2, H=4, K=20, V=24, T=150, pieces=2, split=3, walk='apart'
  ),
  'apart, bfloat16, tight clip, keys alike': Case(
    dtype='bfloat16', clip=0.25, K=32, V=40, T=330, common=0.9, split=4, walk='apart'
  ),
  'apart, whole, bfloat16, grouped heads, odd sizes': Case(
    dtype='bfloat16', B=2, G=2, H=4, K=20, V=24, T=150, segments=True, walk='apart'
  ),
  'apart, additive, segments, resets': Case(
    update='additive', T=129, V=40, segments=True, resets=True, split=5, walk='apart'
  ),
  'apart, whole, additive, float16, extreme gates': Case(
    dtype='float16', update='additive', K=32, V=32, T=100, extreme=True, pieces=2, walk='apart'
  ),
  'paired, additive, bfloat16, no clip, grouped heads, odd sizes': Case(
    dtype='bfloat16', update='additive', clip=None, G=2, H=4, K=20, V=24, T=150, walk='pair'
  ),
  'paired, bfloat16, far bound': Case(dtype='bfloat16', clip=1e6, K=32, V=40, T=100, walk='pair'),
  'large heads, bfloat16, odd sizes': Case(dtype='bfloat16', K=200, V=40, T=125, walk='apart'),
  'large heads, narrow values, additive': Case(
    dtype='float16', update='additive', K=130, V=16, T=70, walk='pair'
  ),
  'looped': Case(T=70, K=20, V=40, looped=True),
}
SLOW_CASES = {
  'split, pieces, grouped heads, odd sizes': Case(G=1, H=2, K=20, V=40, T=150, pieces=2, split=3),
  'split, base alone': Case(residual=False, T=128, split=4),
  'split, additive, base alone': Case(update='additive', residual=False, T=128, split=2),
  'split, hard': Case(hard=True, T=256, split=8),
  'split, large heads': Case(K=200, V=16, T=128, split=4),
  'split, bfloat16': Case(dtype='bfloat16', T=256, K=32, V=32, split=4),
}


def problem(case: Case, seed: int = 0):
  """A call of the oracle, and cotangents, rounded to what the kernels are given."""
  rng = np.random.default_rng(seed)
  B, T, G, H, K, V = case.B, case.T, case.G, case.H, case.K, case.V

  def rounded(x, dtype=case.dtype):
    return np.asarray(jnp.asarray(x, dtype), np.float64)

  def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  q = rounded(unit(rng.standard_normal((B, T, G, K))))
  k = unit(rng.random((B, T, G, K)) if case.hard else rng.standard_normal((B, T, G, K)))
  if case.common:
    k = unit((1 - case.common) * k + case.common * unit(rng.standard_normal((B, 1, G, K))))
  k = rounded(k)
  v = rounded(rng.standard_normal((B, T, H, V)))
  log_decay = np.zeros((B, T, H)) if case.hard else -0.3 * rng.random((B, T, H))
  beta, gamma = np.ones((2, B, T, H)) if case.hard else rng.random((2, B, T, H))
  if case.gates is not None:
    beta, gamma = np.full((2, B, T, H), case.gates)
  if case.extreme:
    beta, gamma = rng.choice([0, 1e-20, 1e-6, 1e-3, 1, -1e-9, -0.3], (2, B, T, H))
  if case.resets:
    log_decay[:, [T // 5, T // 2, T - 1]] = -np.inf
    log_decay[:, T // 4] = -90.0
    beta[:, T // 3], gamma[:, T // 6] = 0, 0
  base, residual = 0.3 * rng.standard_normal((2, B, H, K, V))
  ids = None
  if case.segments:
    ids = np.zeros((B, T), np.int32)
    for cut in (1, T // 3, T // 2, T - 2):
      ids[:, cut:] += 1
  gates = [rounded(x, 'float32') for x in (log_decay, beta, gamma, base, residual)]
  if not case.residual:
    gates[2] = gates[4] = None
  oracle = Call(q, k, v, *gates, ids, update=case.update, clip=case.clip)
  cotangents = {'o': rounded(rng.standard_normal(v.shape))}
  for name in ('base', 'residual') if case.residual else ('base',):
    cotangents[name] = rounded(rng.standard_normal(base.shape), 'float32')
  return oracle, cotangents


def assert_close(name, x, reference, bar):
  found = error(x, reference)
  assert found < bar, f'{name}: {found:.1e}, bar {bar:.0e}'


def unpacked(words_BHCWV, chunk):
  """Tokens [B, T, H, V] of a mask that has a bit a token, 32 tokens a word."""
  token = np.arange(chunk)
  bits = words_BHCWV[:, :, :, token // 32] >> (token % 32)[:, None] & 1
  B, H, C, _, V = bits.shape
  return np.moveaxis(bits.reshape(B, H, C * chunk, V), 1, 2) != 0


@pytest.mark.parametrize(
  'name', [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_values_and_gradients(name, monkeypatch):
  """Interpreted kernels agree with the oracle, the clip's mask pinned to their own."""
  case = (CASES | SLOW_CASES)[name]
  oracle, cotangents = problem(case)
  plain, attend, configs = blocks.heuristic, call.attend, []

  def spy(config, *args):
    configs.append(config)
    return attend(config, *args)

  monkeypatch.setattr(call, 'attend', spy)

  def heuristic(**sizes):
    chosen = plain(**sizes)
    pair = chosen.forward if case.walk else None
    keys = dataclasses.replace(chosen.keys, warps=8) if case.looped else chosen.keys
    return dataclasses.replace(
      chosen, pieces=case.pieces, split=case.split, pair=pair, apart=False, walk=case.walk,
      looped=case.looped, keys=keys,
    )  # fmt: skip

  monkeypatch.setattr(blocks, 'heuristic', heuristic)
  dtypes = [case.dtype] * 3 + ['float32'] * 5
  args = [
    None if x is None else jnp.asarray(x, dtype)
    for x, dtype in zip((getattr(oracle, n) for n in GRADIENTS), dtypes, strict=True)
  ]
  ids = None if oracle.segment_ids is None else jnp.asarray(oracle.segment_ids)
  run = lambda *a: gpu.residual_attention(  # noqa: E731
    *a, ids, update=case.update, clip=case.clip, readout='gated', interpret=True,
    chunk_size=case.chunk_size,
  )  # fmt: skip
  outputs, pull = jax.vjp(run, *args)
  dtypes = (case.dtype, 'float32', 'float32')
  found = pull(
    tuple(
      jnp.asarray(cotangents[n], d) if n in cotangents else None
      for n, d in zip(('o', 'base', 'residual'), dtypes, strict=True)
    )
  )

  values, tensors, gates = BARS[case.dtype]
  reference = recurrence(oracle)
  for n, x in zip(('o', 'base', 'residual'), outputs, strict=True):
    if x is not None:
      assert_close(n, x, reference[n], values)
  mask = None
  if case.residual and case.clip is not None:
    words = forward_pass.forward(configs[0], True)(*args, ids)[1].passes
    mask = unpacked(np.asarray(words), configs[0].blocks.chunk)[:, : case.T]
    flips = np.mean(mask != (np.abs(reference['innovation']) < case.clip))
    assert flips <= (0 if case.dtype == 'float32' else 5e-3), f'flipped: {flips:.1e}'
  expected = gradients(oracle, cotangents, mask)
  for n, x in zip(GRADIENTS, found, strict=True):
    if x is None:
      continue
    assert_close(f'd{n}', x, expected[n], gates if n in GATES else tensors)
    if n in GATES and np.size(x) > 1:
      assert cosine(x, expected[n]) > 0.999, n


@pytest.mark.parametrize(
  ('chunk_size', 'dtype'), [(16, 'bfloat16'), (32, 'bfloat16'), (64, 'bfloat16'), (32, 'float16')]
)
def test_states_of_keys_alike_are_as_exact_as_others(chunk_size, dtype):
  """The inverse keeps its sums down the columns; rounded freely it gives 0.003 to 0.005."""
  oracle, _ = problem(Case(dtype=dtype, T=256, G=8, H=8, K=32, V=32, common=0.9))
  oracle = dataclasses.replace(oracle, log_decay=oracle.log_decay / 20)  # or few tokens are seen
  dtypes = [dtype] * 3 + ['float32'] * 5
  args = [
    jnp.asarray(getattr(oracle, n), d) for n, d in zip(GRADIENTS, dtypes, strict=True)
  ]
  _, base, residual = gpu.residual_attention(
    *args, None, update='delta', clip=1.0, readout='gated', interpret=True, chunk_size=chunk_size
  )
  reference = recurrence(oracle)
  assert_close('base', base, reference['base'], 0.0027)
  assert_close('residual', residual, reference['residual'], 0.0028)


def test_pieces_in_sequence_are_the_whole():
  """States handed from one call to the next give what one call gives."""
  oracle, _ = problem(Case(T=96, H=2))
  args = [jnp.asarray(getattr(oracle, n), jnp.float32) for n in GRADIENTS]
  run = lambda *a: gpu.residual_attention(  # noqa: E731
    *a, None, update='delta', clip=1.0, readout='gated', interpret=True
  )
  o, base, residual = run(*args)
  first = run(*(x[:, :40] for x in args[:6]), *args[6:])
  second = run(*(x[:, 40:] for x in args[:6]), *first[1:])
  np.testing.assert_allclose(np.concatenate([first[0], second[0]], 1), o, atol=2e-6)
  np.testing.assert_allclose(second[1], base, atol=2e-6)
  np.testing.assert_allclose(second[2], residual, atol=2e-6)


@pytest.mark.parametrize(
  ('change', 'word'),
  [
    ({'channel_decay': True}, 'decay'),
    ({'readout': 'sum'}, 'sum'),
    ({'dtype': jnp.float64}, 'float64'),
    ({'key_dim': 300}, '300'),
  ],
)
def test_unsupported_says_why(change, word):
  served = {
    'update': 'delta', 'key_dim': 100, 'value_dim': 60, 'dtype': jnp.bfloat16,
    'channel_decay': False, 'readout': 'gated', 'residual': True,
  }  # fmt: skip
  assert gpu.unsupported(**served) is None
  assert word in gpu.unsupported(**(served | change))


def test_refuses_a_chunk_size_it_lacks():
  oracle, _ = problem(Case(T=8))
  args = [jnp.asarray(getattr(oracle, n), jnp.float32) for n in GRADIENTS]
  with pytest.raises(ValueError, match='chunk_size is 48'):
    gpu.residual_attention(
      *args, None, update='delta', clip=1.0, readout='gated', chunk_size=48, interpret=True
    )


# --- pairs ---


@triton.jit
def _turns_kernel(zeros_ptr, follows_ptr, walk_ptr, flags_ptr):
  follows, walk, flag = take_turn(flags_ptr)
  tl.store(follows_ptr + tl.program_id(0), follows.to(tl.int32))
  tl.store(walk_ptr + tl.program_id(0), walk)
  tl.store(flag, walk)


@pytest.mark.parametrize('walks', [1, blocks.MULTIPROCESSORS - 1, 2 * blocks.MULTIPROCESSORS + 1])
def test_everyone_who_follows_starts_behind_whom_it_follows(walks):
  follows, walk, flags = harness.triton_call(
    jnp.zeros(1 + walks, jnp.int32),
    kernel=_turns_kernel,
    out_shape=(*[jax.ShapeDtypeStruct((2 * walks,), jnp.int32)] * 2,
               jax.ShapeDtypeStruct((1 + walks,), jnp.int32)),
    grid=(2 * walks,),
    input_output_aliases={0: 2},
  )  # fmt: skip
  starts = [np.flatnonzero(np.asarray(follows) == x) for x in (0, 1)]
  order = [np.argsort(np.asarray(walk)[x]) for x in starts]
  leads, following = (np.asarray(x)[o] for x, o in zip(starts, order, strict=True))
  assert (np.sort(np.asarray(walk)[starts[0]]) == np.arange(walks)).all()
  assert (np.sort(np.asarray(walk)[starts[1]]) == np.arange(walks)).all()
  assert (leads < following).all()
  assert (np.asarray(flags) == [2 * walks, *range(walks)]).all()


def test_one_state_has_no_pair():
  chosen = dataclasses.replace(harness.small_blocks(), pair=blocks.Kernel(16, 1, 2))
  with pytest.raises(ValueError, match='one state has no pair'):
    call.Config(delta=False, residual=False, clip=1.0, blocks=chosen, interpret=True)
  chosen = dataclasses.replace(harness.small_blocks(), walk='apart')
  with pytest.raises(ValueError, match='expected the launch of a state'):
    call.Config(delta=True, residual=True, clip=1.0, blocks=chosen, interpret=True)
  chosen = dataclasses.replace(harness.small_blocks(), walk='together')
  with pytest.raises(ValueError, match="is 'together', expected None or one of"):
    call.Config(delta=True, residual=True, clip=1.0, blocks=chosen, interpret=True)


@pytest.mark.parametrize(
  ('delta', 'size', 'heads', 'split', 'expected'),
  [
    (True, 128, 64, 1, 'pair'),
    (True, 128, 66, 1, 'pair'),
    (True, 128, 67, 1, 'both'),
    (True, 128, 64, 4, 'apart'),
    (False, 128, 64, 1, 'both'),
    (True, 256, 33, 1, 'pair'),
    (False, 256, 33, 1, 'pair'),
    (True, 256, 34, 1, 'apart'),
    (False, 256, 34, 1, 'apart'),
  ],
)
def test_walks_of_two_states(delta, size, heads, split, expected):
  """Pairs walk what does not fill the card, and a state at a time what registers do not hold."""
  chosen = blocks.heuristic(
    delta=delta, residual=True, key_dim=size, value_dim=size, dtype='bfloat16', heads=1, length=8192
  )
  assert blocks.walk_of(chosen, value_dim=size, heads=heads, split=split) == expected


@pytest.mark.parametrize(
  ('key_dim', 'value_dim', 'dtype', 'length', 'expected'),
  [
    (256, 256, 'bfloat16', 512, 'apart'),  # a pair's second would begin when the first has ended
    (200, 32, 'float16', 8192, 'pair'),
    (128, 256, 'bfloat16', 8192, 'pair'),
    (256, 256, 'float32', 8192, 'both'),
  ],
)
def test_walks_of_few_heads(key_dim, value_dim, dtype, length, expected):
  chosen = blocks.heuristic(
    delta=True, residual=True, key_dim=key_dim, value_dim=value_dim, dtype=dtype, heads=8,
    length=length,
  )  # fmt: skip
  assert blocks.walk_of(chosen, value_dim=value_dim, heads=8, split=1) == expected
