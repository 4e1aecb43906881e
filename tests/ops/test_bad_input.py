"""Wrong calls: each is a ValueError that names the argument, what it is and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import ops

B, T, G, H, K, V = 2, 6, 2, 4, 3, 5
QK = jnp.ones((B, T, G, K))
GOOD = {
  'q': QK,
  'k': QK,
  'v': jnp.ones((B, T, H, V)),
  'log_decay': -jnp.ones((B, T, H)),
  'beta': jnp.ones((B, T, H)),
  'gamma': jnp.ones((B, T, H)),
}
STATE = jnp.zeros((B, H, K, V))
BOTH = ops.ResidualState(STATE, STATE)
OPERATORS = (ops.residual_linear_attention, ops.residual_delta_rule)
operators = pytest.mark.parametrize('operator', OPERATORS, ids=lambda f: f.__name__)

# (what is wrong, changed arguments, parts of the message)
WRONG = [
  ('q has no batch', {'q': QK[0]}, ['q has shape (6, 2, 3)', '4 dimensions [B, T, G, K]']),
  ('v has an extra axis', {'v': jnp.ones((B, T, H, V, 1))}, ['v has shape', '[B, T, H, V]']),
  ('k is a list', {'k': [1.0]}, ['k is a list', 'expected an array [B, T, G, K]']),
  ('v is None', {'v': None}, ['v is a NoneType', '[B, T, H, V]']),
  ('k is longer', {'k': jnp.ones((B, T + 1, G, K))}, ['q has shape', 'k has shape (2, 7, 2, 3)']),
  ('k is wider', {'k': jnp.ones((B, T, G, K + 1))}, ['q has shape', 'k has shape', 'equal shapes']),
  ('other heads in k', {'k': jnp.ones((B, T, 1, K))}, ['q has shape', 'k has shape']),
  ('v is shorter', {'v': jnp.ones((B, T - 1, H, V))}, ['v has shape (2, 5, 4, 5)', '[B, T]']),
  ('v has another batch', {'v': jnp.ones((B + 1, T, H, V))}, ['v has shape (3, 6, 4, 5)']),
  ('heads do not divide', {'v': jnp.ones((B, T, 3, V))}, ['v has 3 heads', 'k has 2', 'divide']),
  ('fewer value heads', {'v': jnp.ones((B, T, 1, V))}, ['v has 1 heads', 'k has 2', 'divide']),
  ('q is integer', {'q': QK.astype(int)}, ['q has dtype int32', 'floating']),
  ('v is complex', {'v': jnp.ones((B, T, H, V), complex)}, ['v has dtype complex64', 'floating']),
  ('beta a key head', {'beta': jnp.ones((B, T, G))},
   ['beta has shape (2, 6, 2)', '[B, T, H] = (2, 6, 4)']),
  ('beta is a number', {'beta': 0.5}, ['beta is a float', '[B, T, H] = (2, 6, 4)']),
  ('beta is boolean', {'beta': jnp.ones((B, T, H), bool)}, ['beta has dtype bool', 'floating']),
  ('gamma with heads first', {'gamma': jnp.ones((B, H, T))},
   ['gamma has shape (2, 4, 6)', '[B, T, H] = (2, 6, 4)']),
  ('gamma is integer', {'gamma': jnp.ones((B, T, H), int)}, ['gamma has dtype int32', 'floating']),
  ('log_decay without heads', {'log_decay': -jnp.ones((B, T))},
   ['log_decay has shape (2, 6)', '[B, T, H] = (2, 6, 4)', '(2, 6, 4, 3)']),
  ('log_decay a value channel', {'log_decay': -jnp.ones((B, T, H, V))},
   ['log_decay has shape (2, 6, 4, 5)', '(2, 6, 4, 3)']),
  ('a decay, not its log', {'log_decay': 0.9 * jnp.ones((B, T, H))},
   ['log_decay holds 0.9', 'natural logs', '<= 0']),
  ('log_decay is a number', {'log_decay': -0.1}, ['log_decay has shape float', '[B, T, H]']),
  ('log_decay is integer', {'log_decay': -jnp.ones((B, T, H), int)},
   ['log_decay has dtype int32', 'floating']),
  ('clip is zero', {'clip': 0.0}, ['clip is 0.0', '> 0']),
  ('clip is negative', {'clip': -1}, ['clip is -1;', '> 0']),
  ('clip is NaN', {'clip': float('nan')}, ['clip is nan', '> 0']),
  ('clip is a name', {'clip': 'off'}, ["clip is 'off'", 'None for no clipping']),
  ('clip a head', {'clip': jnp.ones(H)}, ['clip', '> 0']),
  ('unknown read-out', {'readout': 'mean'}, ["readout is 'mean'", "'gated' or 'sum'"]),
  ('chunk of no tokens', {'chunk_size': 0}, ['chunk_size is 0', 'positive int']),
  ('fractional chunk', {'chunk_size': 16.0}, ['chunk_size is 16.0', 'positive int']),
  ('state is an array', {'initial_state': STATE}, ['initial_state is a', 'ResidualState']),
  ('state transposed', {'initial_state': ops.ResidualState(*(jnp.zeros((B, H, V, K)),) * 2)},
   ['initial_state.base has shape (2, 4, 5, 3)', '[B, H, K, V] = (2, 4, 3, 5)']),
  ('residual of another batch', {'initial_state': ops.ResidualState(STATE, STATE[:1])},
   ['initial_state.residual has shape (1, 4, 3, 5)', '[B, H, K, V] = (2, 4, 3, 5)']),
  ('state without residual', {'initial_state': ops.ResidualState(STATE, None)},
   ['initial_state.residual is None', 'gamma is given']),
  ('residual without gamma', {'initial_state': BOTH, 'gamma': None},
   ['initial_state.residual is an array', 'gamma is None']),
  ('integer state', {'initial_state': ops.ResidualState(STATE.astype(int), STATE)},
   ['initial_state.base has dtype int32', 'floating']),
  ('ids a batch', {'segment_ids': jnp.zeros(B, int)},
   ['segment_ids has shape (2,)', '[B, T] = (2, 6)']),
  ('ids are floats', {'segment_ids': jnp.zeros((B, T))},
   ['segment_ids has dtype float32', 'integer']),
  ('unknown implementation', {'implementation': 'cuda'},
   ["implementation is 'cuda'", 'reference', 'chunked', 'triton']),
  ('nothing to try', {'implementation': ()}, ['implementation is ()', 'non-empty sequence']),
  ('one unknown name', {'implementation': ('chunked', 'fast')}, ["('chunked', 'fast')"]),
]  # fmt: skip


@operators
@pytest.mark.parametrize(('changes', 'parts'), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_call_says_what_is_wrong(operator, changes, parts):
  with pytest.raises(ValueError) as caught:
    operator(**(GOOD | changes))
  for part in parts:
    assert part in str(caught.value)


def test_the_right_call_is_right():
  """Else every wrong call could fail for one and the same reason."""
  for operator in OPERATORS:
    o, _ = operator(**GOOD, initial_state=BOTH, segment_ids=jnp.zeros((B, T), int))
    assert o.shape == (B, T, H, V)


STEP = {name: x[:, 0] for name, x in GOOD.items()} | {'state': BOTH}
WRONG_STEP = [
  ('a time axis', {'q': QK}, ['q has shape (2, 6, 2, 3)', '3 dimensions [B, G, K]']),
  ('a gate of a sequence', {'beta': GOOD['beta']}, ['beta has shape (2, 6, 4)', '[B, H] = (2, 4)']),
  ('a positive log decay', {'log_decay': jnp.ones((B, H))}, ['log_decay holds 1', '<= 0']),
  ('a state of other sizes', {'state': ops.ResidualState(STATE[:, :1], STATE)},
   ['state.base has shape (2, 1, 3, 5)', '(2, 4, 3, 5)']),
  ('no gamma', {'gamma': None}, ['state.residual is an array', 'gamma is None']),
  ('no clip', {'clip': 0}, ['clip is 0;', '> 0']),
]  # fmt: skip


@pytest.mark.parametrize(
  'step', [ops.residual_linear_attention_step, ops.residual_delta_rule_step],
  ids=lambda f: f.__name__,
)  # fmt: skip
@pytest.mark.parametrize(
  ('changes', 'parts'), [w[1:] for w in WRONG_STEP], ids=[w[0] for w in WRONG_STEP]
)
def test_a_wrong_step_says_what_is_wrong(step, changes, parts):
  with pytest.raises(ValueError) as caught:
    step(**(STEP | changes))
  for part in parts:
    assert part in str(caught.value)


@pytest.mark.parametrize('positions', [[3, 1], [1, 1], [-1], [7]])
def test_wrong_positions(positions):
  with pytest.raises(ValueError, match=r'positions is .* increasing integers within \[0, 6\]'):
    ops.states_at(ops.residual_delta_rule, positions, *GOOD.values())


def test_a_positive_log_decay_is_seen_in_numpy_and_in_any_element():
  log_decay = np.zeros((B, T, H, K), np.float32)
  log_decay[1, 2, 3, 1] = 0.25
  with pytest.raises(ValueError, match=r'log_decay holds 0\.25'):
    ops.residual_delta_rule(**(GOOD | {'log_decay': log_decay}))


def test_no_decay_and_full_resets_are_right():
  for value in (0.0, -0.0, -np.inf):
    o, _ = ops.residual_delta_rule(**(GOOD | {'log_decay': jnp.full((B, T, H), value)}))
    assert np.isfinite(o).all()


@pytest.mark.parametrize('part', ['base', 'residual'])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_broken_initial_state_breaks_the_first_document_alone(part, bad):
  ids = jnp.asarray([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
  state = BOTH._replace(**{part: STATE.at[0, 1, 2, 3].set(bad)})
  options = {'segment_ids': ids, 'implementation': 'reference'}
  o, final = ops.residual_delta_rule(**GOOD, initial_state=state, **options)
  clean, _ = ops.residual_delta_rule(**GOOD, initial_state=BOTH, **options)
  assert np.isnan(o[0, :2]).all()
  np.testing.assert_array_equal(o[0, 2:], clean[0, 2:])
  np.testing.assert_array_equal(o[1], clean[1])
  assert all(np.isfinite(s).all() for s in final)


def test_what_is_known_to_be_finite_is_not_searched():
  """A broken gate then gives NaN to its document's outputs, and to the gradients of its gates."""
  ids = jnp.asarray([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
  good = {**GOOD, 'log_decay': GOOD['log_decay'].at[0, 3, 1].set(jnp.nan)}

  def run(good, finite):
    return ops.residual_delta_rule(
      **good, segment_ids=ids, implementation='reference', finite=finite
    )[0]

  def gradient(finite):
    return jax.grad(lambda good: run(good, finite).sum())(good)

  np.testing.assert_array_equal(run(good, True), run(good, False))
  got, want = gradient(True), gradient(False)
  for name in GOOD:
    clean = (1, slice(None)) if name in 'qkv' else slice(None)
    np.testing.assert_array_equal(got[name][clean], want[name][clean])
  assert np.isfinite(got['q']).all() and np.isnan(got['beta'][0, 2:]).all()
  programs = [str(jax.make_jaxpr(lambda g, f=f: run(g, f))(good)) for f in (False, True)]
  assert programs[0].count('is_finite') - programs[1].count('is_finite') == 3
  found = ops.explain_implementations('residual_delta_rule', **GOOD, finite=True)
  assert found['reference'] is None


def test_a_traced_clip_is_refused():
  with pytest.raises(ValueError, match=r'clip is traced; expected a Python number'):
    jax.jit(lambda clip: ops.residual_delta_rule(**GOOD, clip=clip))(1.0)


@pytest.mark.parametrize('name', ['triton', 'pallas'])
def test_a_kernel_without_its_device_is_refused(name):
  if jax.default_backend() != 'cpu':
    pytest.skip('this backend may have the kernel')
  with pytest.raises(NotImplementedError) as caught:
    ops.residual_delta_rule(**GOOD, implementation=name)
  reason = ops.explain_implementations('residual_delta_rule', **GOOD)[name]
  device = {'triton': 'NVIDIA GPUs', 'pallas': 'TPUs'}[name]
  assert device in reason
  assert reason in str(caught.value)
  assert "These can: ['reference', 'associative', 'chunked']" in str(caught.value)


def test_a_sequence_is_tried_in_order():
  wanted = ('triton', 'pallas', 'reference', 'chunked')
  chosen = ops.select_implementation(
    ops.residual_delta_rule, *GOOD.values(), implementation=wanted
  )
  if jax.default_backend() == 'cpu':
    assert chosen == 'reference'
  with pytest.raises(ValueError, match="operator is 'attention'"):
    ops.select_implementation('attention', *GOOD.values())
  with pytest.raises(ValueError, match=r"operator is 'ArrayImpl'; expected one of \['residual_li"):
    ops.select_implementation(*GOOD.values())
  with pytest.raises(ValueError, match=r"unknown arguments \['clipping'\]"):
    ops.explain_implementations('residual_delta_rule', *GOOD.values(), clipping=1.0)


def test_default_names_and_questions():
  assert ops.IMPLEMENTATIONS == ('reference', 'associative', 'chunked', 'triton', 'pallas')
  reasons = ops.explain_implementations('residual_delta_rule', *GOOD.values())
  assert tuple(reasons) == ops.IMPLEMENTATIONS
  if jax.default_backend() == 'cpu':
    assert ops.select_implementation('residual_delta_rule', *GOOD.values()) == 'chunked'
