"""The TPU kernels under an interpreter that watches memory: races, bounds, uninitialised reads."""

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests import oracle
from tests.kernels import tpu_harness as harness

STRICT = pltpu.InterpretParams(
  detect_races=True, out_of_bounds_reads='raise', uninitialized_memory='nan'
)


@pytest.mark.slow
@pytest.mark.parametrize('update', ['additive', 'delta'])
def test_memory_is_used_as_it_should(update):
  # Two grid steps of four chunks, and one chunk padded.
  call = harness.make_call(update=update, time=70, segments=[0, 20])
  wanted = harness.cotangents(call, jnp.float32)
  out, gradients = harness.run(call, wanted=wanted, interpret=STRICT)
  reference = oracle.recurrence(call)
  harness.assert_close(out, {name: reference[name] for name in out}, lambda name: 2e-5)
  harness.assert_close(gradients, oracle.gradients(call, wanted), lambda name: 2e-5)
