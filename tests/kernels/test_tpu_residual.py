"""What is the TPU kernels' own, in interpretation: head blocks, vmap, remat, the decode step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax.kernels.residual import tpu
from tests import oracle
from tests.kernels import tpu_harness as harness

RULES = {
  'rla': {'update': 'additive'},
  'rdn': {'update': 'delta'},
  'gla': {'update': 'additive', 'gamma': None, 'residual': None},
  'gdn': {'update': 'delta', 'gamma': None, 'residual': None},
}
# Beyond the case list that all implementations share (test_tpu_cases.py).
CASES = {
  'shared_keys': {'heads': 4, 'keys': 2, 'time': 20},
  'sum': {'readout': 'sum', 'segments': [0, 7], 'time': 20},
  'many_shared': {'heads': 16, 'keys': 1, 'time': 20},
  'resets_in_documents': {'resets': True, 'segments': [0, 15, 16, 33], 'heads': 2, 'batch': 2},
  'no_decay': {'decay': 0.0, 'strength': 1.0},
  'chunk_64': {'time': 200, 'chunk_size': 64, 'key_dim': 60, 'value_dim': 100},
}
FAST = {('rdn', 'sum'), ('gdn', 'shared_keys'), ('gla', 'shared_keys')}


def each_rule_and_case():
  """Every pair; those that are not FAST are slow."""
  return [
    pytest.param(rule, case, marks=() if (rule, case) in FAST else pytest.mark.slow)
    for rule in RULES for case in CASES if case != 'sum' or rule in ('rla', 'rdn')
  ]  # fmt: skip


def check(rule, options):
  options = dict(options)
  chunk_size = options.pop('chunk_size', 16)
  call = harness.make_call(**(options | RULES[rule]))
  wanted = harness.cotangents(call, jnp.float32)
  out, gradients = harness.run(call, wanted=wanted, chunk_size=chunk_size)
  reference = oracle.recurrence(call)
  harness.assert_close(out, {name: reference[name] for name in out}, lambda name: 2e-5)
  reference = oracle.gradients(call, wanted)
  harness.assert_close(gradients, reference, lambda name: 2e-5)


@pytest.mark.parametrize(('rule', 'case'), each_rule_and_case())
def test_float32(rule, case):
  check(rule, CASES[case])


@pytest.mark.slow
def test_bfloat16_clip_flips_few_elements():
  call = harness.make_call(dtype=jnp.bfloat16, time=32, value_dim=32, key_dim=32, decay=0.5)
  wanted = harness.cotangents(call, jnp.bfloat16)
  _, gradients = harness.run(call, jnp.bfloat16, wanted=wanted, chunk_size=32)
  reference = oracle.gradients(call, wanted)
  off = np.abs(np.asarray(gradients['v'], np.float64) - reference['v'])
  # An element whose mask differs is off by a whole gradient; rounding is far below.
  assert (off > 0.1 * np.sqrt(np.mean(reference['v'] ** 2))).mean() < 0.01


@pytest.mark.slow
def test_states_carry_a_sequence_in_pieces():
  call = harness.make_call(time=40, heads=1)
  whole, _ = harness.run(call)
  def cut(x, at):
    return x if x is None or (x.ndim != 4 and x.ndim != 3) else x[:, at]
  first, second = (
    call.replace(**{n: cut(getattr(call, n), at) for n in ('q', 'k', 'v', *harness.GATES)})
    for at in (slice(0, 24), slice(24, None))
  )
  a, _ = harness.run(first)
  b, _ = harness.run(
    second.replace(base=np.asarray(a['base']), residual=np.asarray(a['residual']))
  )
  o = np.concatenate([a['o'], b['o']], axis=1)
  assert harness.error(o, np.asarray(whole['o'], np.float64)) < 2e-6
  assert harness.error(b['residual'], np.asarray(whole['residual'], np.float64)) < 2e-6


@pytest.mark.slow
def test_segments_do_not_see_each_other():
  call = harness.make_call(time=40, segments=[0, 20])
  changed = call.replace(v=np.where(np.arange(40)[:, None, None] < 20, 100.0, call.v[0])[None])
  found, other = (harness.run(c)[0] for c in (call, changed))
  np.testing.assert_array_equal(found['o'][:, 20:], other['o'][:, 20:])
  np.testing.assert_array_equal(found['residual'], other['residual'])
  assert (found['o'][:, :20] != other['o'][:, :20]).any()


@pytest.mark.parametrize('update', ['additive', pytest.param('delta', marks=pytest.mark.slow)])
def test_vmap_and_remat(update):
  call = harness.make_call(time=20, update=update)
  wanted = harness.cotangents(call, jnp.float32)
  _, gradients = harness.run(call, wanted=wanted)
  args = [jnp.asarray(getattr(call, n), jnp.float32) for n in oracle.GRADIENTS]

  def loss(args):
    out = tpu.residual_attention(
      *args, None, update=update, clip=1.0, readout='gated', chunk_size=16, interpret=True
    )
    pairs = zip(out, (wanted[n] for n in oracle.OUTPUTS))
    return sum(jnp.vdot(x, jnp.asarray(w, x.dtype)) for x, w in pairs)

  policy = jax.checkpoint_policies.save_only_these_names(*tpu.SAVED)
  gradient = jax.grad(jax.checkpoint(loss, policy=policy))
  many = [jnp.stack([x, x]) for x in args]
  found = jax.jit(jax.vmap(gradient))(many)
  for name, x in zip(oracle.GRADIENTS, found):
    for one in x:
      assert harness.error(one, np.asarray(gradients[name], np.float64)) < 2e-6, name


@pytest.mark.parametrize('readout', ['gated', pytest.param('sum', marks=pytest.mark.slow)])
@pytest.mark.parametrize('rule', RULES)
def test_decode_step(rule, readout):
  call = harness.make_call(
    batch=2, time=1, keys=2, heads=4, key_dim=20, value_dim=24, readout=readout, **RULES[rule]
  )
  args = {name: jnp.asarray(x, jnp.float32) for name, x in call.arrays().items()}
  def token(name):
    return args[name][:, 0] if name in args else None
  out = tpu.residual_attention_step(
    *(token(name) for name in ('q', 'k', 'v', *harness.GATES)), args['base'], args.get('residual'),
    update=call.update, clip=call.clip, readout=readout, interpret=True,
  )  # fmt: skip
  reference = oracle.recurrence(call)
  assert harness.error(out[0], reference['o'][:, 0]) < 2e-6
  for name, state in zip(harness.STATES, out[1:]):
    if name in reference:
      assert harness.error(state, reference[name]) < 2e-6
    else:
      assert state is None


def test_unsupported_names_the_reason():
  serves = {
    'update': 'delta', 'key_dim': 128, 'value_dim': 256, 'dtype': jnp.bfloat16,
    'channel_decay': False, 'readout': 'gated', 'residual': True,
  }  # fmt: skip
  assert tpu.unsupported(**serves) is None
  assert 'float16' in tpu.unsupported(**serves | {'dtype': jnp.float16})
  assert 'channel' in tpu.unsupported(**serves | {'channel_decay': True})
  assert '512' in tpu.unsupported(**serves | {'key_dim': 512})


def test_unknown_chunk_size():
  with pytest.raises(ValueError, match='chunk_size 48'):
    harness.run(harness.make_call(), chunk_size=48)
