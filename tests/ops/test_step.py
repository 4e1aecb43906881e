"""Decoding steps, kept states and pieces: the same numbers as one call over the whole sequence."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rla_jax import ops
from tests import oracle
from tests.ops import cases, harness

STEPS = {
  'additive': ops.residual_linear_attention_step,
  'delta': ops.residual_delta_rule_step,
}
TOKENS = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma')
IMPLEMENTATIONS = ('reference', 'chunked', 'associative')
implementations = pytest.mark.parametrize('implementation', IMPLEMENTATIONS)
updates = pytest.mark.parametrize('update', cases.UPDATES)


def _arrays(call, start=None, stop=None):
  """Token arrays by position, cut to some tokens, and the state before the first."""
  tokens = [getattr(call, name) for name in TOKENS]
  tokens = [None if x is None else jnp.asarray(x[:, start:stop]) for x in tokens]
  base, residual = (None if x is None else jnp.asarray(x) for x in (call.base, call.residual))
  return tokens, ops.ResidualState(base, residual)


def _decode(call, tokens, state):
  """One step a token: o [B, T, H, V] and the final state."""
  step = functools.partial(STEPS[call.update], clip=call.clip, readout=call.readout)

  def body(state, token):
    o, state = step(*token, state)
    return state, o

  state, o = jax.lax.scan(body, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
  return jnp.moveaxis(o, 0, 1), state


def _close(got, want, bar):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert harness.error(x, y) <= bar


@updates
@pytest.mark.parametrize('name', ['typical', 'read_out_sum', 'channel_decay', 'base_model'])
def test_a_thousand_steps_equal_the_sequence(update, name):
  call = cases.BY_NAME[name].call(update, B=1, T=1000)
  tokens, state = _arrays(call)
  decoded = jax.jit(functools.partial(_decode, call))(tokens, state)
  for implementation in IMPLEMENTATIONS[: 3 if name == 'typical' else 2]:
    whole = jax.jit(functools.partial(
      harness.OPERATORS[update], initial_state=state, clip=call.clip, readout=call.readout,
      implementation=implementation,
    ))(*tokens)  # fmt: skip
    _close(decoded, whole, 1e-6)


@updates
def test_a_step_in_grouped_heads_and_bfloat16(update):
  call = cases.BY_NAME['grouped_heads'].call(update, 'bfloat16', T=1)
  tokens, state = _arrays(call)
  o, state = STEPS[update](*(x[:, 0] for x in tokens), state)
  want = oracle.recurrence(call)
  assert o.dtype == jnp.bfloat16
  assert state.base.dtype == state.residual.dtype == jnp.float32
  _close((o[:, None], *state), (want['o'], want['base'], want['residual']), 5e-3)


@updates
@pytest.mark.parametrize('name', ['typical', 'channel_strong_decay', 'base_model'])
def test_gradients_of_a_step(update, name):
  """The step is the sequence of one token, its gradient too."""
  call = cases.BY_NAME[name].call(update, T=1)
  cotangents = cases.cotangents(call)

  def run(arrays):
    arrays = dict(arrays)
    state = ops.ResidualState(arrays.pop('base'), arrays.pop('residual', None))
    tokens = [arrays[n][:, 0] if n in arrays else None for n in TOKENS]
    o, state = STEPS[update](*tokens, state)
    found = {'o': o[:, None], 'base': state.base, 'residual': state.residual}
    return {n: x for n, x in found.items() if x is not None}

  out, pull = jax.vjp(run, {n: jnp.asarray(x) for n, x in call.arrays().items()})
  named = {**out, **{f'd{n}': x for n, x in pull(jax.tree.map(jnp.asarray, cotangents))[0].items()}}
  got = {n: np.asarray(x, np.float64) for n, x in named.items()}
  harness.assert_within(got, harness.expected(call, cotangents), harness.BARS['float32'])


@updates
def test_roll_back_of_rejected_tokens(update):
  """Speculative decoding: of ten drafted tokens four are rejected; a kept state undoes them."""
  call = cases.BY_NAME['typical'].call(update)
  tokens, state = _arrays(call)
  step = jax.jit(functools.partial(STEPS[update], clip=call.clip))
  at = [[x[:, t] for x in tokens] for t in range(20)]

  kept = [state]
  for t in range(10):
    kept.append(step(*at[t], kept[-1])[1])
  # The verifier rejects tokens 6 to 9: continue from the state before them with others.
  _, state = step(*at[15], kept[6])
  straight = kept[0]
  for t in (0, 1, 2, 3, 4, 5, 15):
    _, straight = step(*at[t], straight)
  for got, want in zip(state, straight, strict=True):
    np.testing.assert_array_equal(got, want)


@updates
def test_decode_continues_a_chunked_prefill(update):
  call = cases.BY_NAME['typical'].call(update)
  (tokens, state), length = _arrays(call), 60
  operator = functools.partial(harness.OPERATORS[update], implementation='chunked')
  o_prefill, state_prefill = operator(*(x[:, :length] for x in tokens), initial_state=state)
  o_decoded, final = _decode(call, [x[:, length:] for x in tokens], state_prefill)
  whole = operator(*tokens, initial_state=state)
  _close((jnp.concatenate([o_prefill, o_decoded], axis=1), final), whole, 1e-6)


@implementations
@updates
def test_states_at_positions(update, implementation):
  call = cases.BY_NAME['segments'].call(update, T=70)
  tokens, state = _arrays(call)
  positions = [0, 1, 20, 64, 70]
  o, states = ops.states_at(
    harness.OPERATORS[update], positions, *tokens, initial_state=state,
    segment_ids=jnp.asarray(call.segment_ids), implementation=implementation,
  )  # fmt: skip
  want = oracle.recurrence(call)
  _close(o, want['o'], 2e-5)
  assert len(states) == len(positions)
  for position, state in zip(positions, states, strict=True):
    cut = {n: getattr(call, n)[:, :position] for n in (*TOKENS, 'segment_ids')}
    want = oracle.recurrence(call.replace(**cut))
    _close(state, (want['base'], want['residual']), 2e-5)


def test_states_at_without_an_initial_state():
  call = cases.BY_NAME['typical'].call('delta', T=8)
  tokens, _ = _arrays(call)
  o, states = ops.states_at(ops.residual_delta_rule, [0, 3], *tokens)
  whole, _ = ops.residual_delta_rule(*tokens)
  _close(o, whole, 1e-6)
  np.testing.assert_array_equal(states[0].base, np.zeros((2, 2, 8, 12)))
  _, after = ops.residual_delta_rule(*(x[:, :3] for x in tokens))
  _close(states[1], after, 1e-6)


@st.composite
def _pieces(draw):
  """A call of any shape and kind, and where to cut it."""
  group, groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (2, 2)]))
  T = draw(st.integers(1, 40))
  sizes = {
    'B': draw(st.integers(1, 2)), 'T': T, 'G': groups, 'H': group * groups,
    'K': draw(st.integers(1, 9)), 'V': draw(st.integers(1, 9)),
  }  # fmt: skip
  names = ['typical', 'resets', 'strong_decay', 'channel_decay', 'base_model']
  name, update = draw(st.sampled_from(names)), draw(st.sampled_from(cases.UPDATES))
  dtype = draw(st.sampled_from(['float32', 'bfloat16']))
  call = cases.BY_NAME[name].call(update, dtype, **sizes)
  if draw(st.booleans()):
    starts = draw(st.lists(st.booleans(), min_size=T, max_size=T))
    ids = np.cumsum(starts).astype(np.int32)
    call = call.replace(segment_ids=np.stack([ids, 0 * ids])[: sizes['B']])
  return call, draw(st.lists(st.integers(0, T), max_size=2).map(sorted)), dtype


@implementations
@hypothesis.given(drawn=_pieces(), chunk_size=st.sampled_from([None, 4, 16]))
@hypothesis.settings(max_examples=10, deadline=None, derandomize=True, database=None)
def test_pieces_with_the_state_carried(implementation, drawn, chunk_size):
  call, cuts, dtype = drawn
  want = oracle.recurrence(call)
  operator = jax.jit(functools.partial(
    harness.OPERATORS[call.update], chunk_size=chunk_size, implementation=implementation
  ))  # fmt: skip
  _, state = _arrays(call)
  outputs = []
  cuts = [0, *cuts, call.v.shape[1]]
  for start, stop in itertools.pairwise(cuts):
    tokens, _ = _arrays(call, start, stop)
    ids = call.segment_ids
    if ids is not None:
      # A document that ended at the cut does not reach the next piece.
      if 0 < start < stop:
        ended = jnp.asarray(ids[:, start] != ids[:, start - 1])[:, None, None, None]
        state = jax.tree.map(lambda s, ended=ended: jnp.where(ended, 0, s), state)
      ids = jnp.asarray(ids[:, start:stop])
    o, state = operator(*tokens, initial_state=state, segment_ids=ids)
    outputs.append(o)
  want = [want[name] for name in oracle.OUTPUTS if name in want]
  _close((jnp.concatenate(outputs, axis=1), state), want, harness.BARS[dtype]['o'])
