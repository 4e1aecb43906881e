"""The TPU kernels under an interpreter that watches memory: races, bounds, uninitialised reads."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rla_jax.kernels.residual import tpu
from tests import oracle
from tests.kernels import tpu_harness as harness

# Two cores, which share the parallel part of a grid.
STRICT = pltpu.InterpretParams(
  detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan',
  num_cores_or_threads=2,
)  # fmt: skip
RACE = 'RACE DETECTED'  # JAX 0.10 only prints it.
BASE_MODEL = {'gamma': None, 'residual': None}


def check(capfd, **options):
  """Both passes with two sequences, two grid steps of four chunks, the last ones padded."""
  call = harness.make_call(batch=2, time=36, segments=[0, 20], **options)
  wanted = harness.cotangents(call, jnp.float32)
  out, gradients = harness.run(call, wanted=wanted, chunk_size=8, interpret=STRICT)
  reference = oracle.recurrence(call)
  harness.assert_close(out, {name: reference[name] for name in out}, lambda name: 2e-5)
  harness.assert_close(gradients, oracle.gradients(call, wanted), lambda name: 2e-5)
  assert RACE not in capfd.readouterr().out


def test_memory_is_used_as_it_should(capfd):
  check(capfd, update='delta')


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    {'update': 'additive'}, {'update': 'additive', **BASE_MODEL}, {'update': 'delta', **BASE_MODEL},
    {'update': 'delta', 'heads': 16, 'keys': 1}, {'update': 'delta', 'heads': 4, 'keys': 2},
  ],
)  # fmt: skip
def test_memory_is_used_as_it_should_by_all(capfd, options):
  """Other rules; key heads that value heads of one grid step, or of two, share."""
  check(capfd, **options)


@pytest.mark.parametrize('changes', [{}, BASE_MODEL], ids=['residual', 'base_model'])
def test_a_decode_step_uses_memory_as_it_should(capfd, changes):
  call = harness.make_call(batch=2, time=1, keys=2, heads=4, **changes)
  args = [None if x is None else jnp.asarray(x[:, 0], jnp.float32) for x in (
    call.q, call.k, call.v, call.log_decay, call.beta, call.gamma
  )]  # fmt: skip
  states = [None if x is None else jnp.asarray(x, jnp.float32) for x in (call.base, call.residual)]
  out = tpu.residual_attention_step(
    *args, *states, update=call.update, clip=call.clip, readout=call.readout, interpret=STRICT
  )
  reference = oracle.recurrence(call)
  assert harness.error(out[0], reference['o'][:, 0]) < 2e-6
  for name, state in zip(harness.STATES, out[1:]):
    assert state is None or harness.error(state, reference[name]) < 2e-6
  assert RACE not in capfd.readouterr().out


def _call(kernel, block, *args):
  """A kernel on a grid of two parallel steps; both see all of the input."""
  whole = pl.BlockSpec((8, 128), lambda i: (0, 0))
  return jax.block_until_ready(pl.pallas_call(
    kernel, grid=(2,), in_specs=[whole for _ in args],
    out_specs=pl.BlockSpec((8, 128), lambda i: (block(i), 0)),
    out_shape=jax.ShapeDtypeStruct((16, 128), jnp.float32), interpret=STRICT,
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
  )(*args))  # fmt: skip


def test_the_interpreter_sees_a_race(capfd):
  """Two cores write the same block."""
  def kernel(out):
    out[...] = jnp.zeros_like(out)

  said = ''
  try:
    _call(kernel, lambda i: 0)
  except Exception as error:  # Newer versions of JAX raise what older ones print.
    said = str(error)
    pltpu.reset_tpu_interpret_mode_state()
  assert RACE in said + capfd.readouterr().out


def test_the_interpreter_sees_what_was_never_written():
  def kernel(out):
    out[:4] = jnp.zeros((4, 128))

  assert jnp.isnan(_call(kernel, lambda i: i)).sum() == 8 * 128


def test_the_interpreter_sees_a_read_out_of_bounds():
  def kernel(x, out):
    out[...] = x[pl.ds(8 * (pl.program_id(0) + 1), 8)]

  try:
    with pytest.raises(Exception, match=r'[Oo]ut-of-bounds'):
      _call(kernel, lambda i: i, jnp.zeros((8, 128)))
  finally:
    pltpu.reset_tpu_interpret_mode_state()
