"""Times a JAX function on the device, without the host's part.

Method: one jitted program runs the function `LOOP` times; `n` and `2 n` dispatches of it are timed
to the end of the last, and the difference is divided by `n LOOP`, so that entry and synchronisation
cancel; dispatch runs ahead of the device. Each run gets one element of every input from the last
run's outputs, so that nothing can be hoisted out of the loop, and the outputs are carried whole, so
that nothing can be left out. What these updates cost (a few microseconds) is measured by the same
program without the function and taken off. The median of several differences is reported.
"""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

LOOP = 8
SLOW = 0.4  # seconds of a program from which on it is timed alone, three times


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Seconds of one call (median, and the middle half's width), bytes at its peak."""

  seconds: float
  spread: float
  peak_bytes: int
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Prepared:
  """The compiled programs of a measurement: the function, the loop, the loop without it."""

  once: jax.stages.Compiled
  loop: jax.stages.Compiled
  empty: jax.stages.Compiled | None
  compile_seconds: float


def prepare(function: Callable, inputs: tuple) -> Prepared:
  """Compiles what `measure` runs; `inputs` are arrays or ShapeDtypeStructs. Threads may do it."""
  once, outputs, seconds = _compile(function, inputs)

  def body(inputs, outputs):
    inputs = _touch(inputs, outputs)  # carried on, or each run would begin with a copy of them all
    return inputs, function(*inputs)

  def nothing(inputs, outputs):
    return _touch(inputs, outputs), outputs

  state = (inputs, outputs)
  return Prepared(once, _compile_loop(body, state), _compile_loop(nothing, state), seconds)


def prepare_in_place(step: Callable, inputs: tuple, states: tuple) -> Prepared:
  """The same for `o, *states = step(*inputs, *states)` with the states fed back: decoding."""
  once, outputs, seconds = _compile(step, (*inputs, *states))

  def body(inputs, outputs):
    o, *new = step(*inputs, *outputs[1:])
    return inputs, (o, *new)

  return Prepared(once, _compile_loop(body, (inputs, tuple(outputs))), None, seconds)


def _compile(function, inputs):
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*inputs).compile()
  return compiled, jax.eval_shape(function, *inputs), time.perf_counter() - start


def _compile_loop(body, state):
  def run(*state):
    return jax.lax.fori_loop(0, LOOP, lambda _, carry: body(*carry), state)

  return jax.jit(run, donate_argnums=(0, 1)).lower(*state).compile()


def measure(
  prepared: Prepared, inputs: tuple, *, repeats: int = 7, target_seconds: float = 0.05
) -> Measurement:
  """Times what `prepared` holds. `target_seconds` is the device time of one sample.

  Peak memory is what the compiled program allocates: arguments, outputs and temporaries.

  Args:
    prepared: what `prepare` or `prepare_in_place` returned.
    inputs: all arguments of the function, as it was prepared for.
    repeats: samples of the median.
    target_seconds: see above.

  Raises:
    FloatingPointError: an output is not finite or all zero, so that its time would mean nothing.
  """
  outputs = jax.block_until_ready(prepared.once(*inputs))
  _check(outputs)
  arguments = inputs
  if prepared.empty is None:  # the states are carried as outputs
    outputs = tuple(outputs)
    arguments = inputs[: len(inputs) - (len(outputs) - 1)]
  state = (arguments, outputs)
  seconds, spread = _time(prepared.loop, state, repeats, target_seconds)
  if prepared.empty is not None:
    seconds -= _time(prepared.empty, state, 3, target_seconds / 8)[0]
  return Measurement(seconds, spread, peak_bytes(prepared.once), prepared.compile_seconds)


def _time(program, state, repeats, target_seconds):
  state = jax.tree.map(jnp.copy, state)  # the program takes over its arguments

  def clock(dispatches):
    nonlocal state
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(dispatches):
      state = program(*state)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  clock(1)
  if (once := clock(1)) > SLOW:  # entry and synchronisation do not matter
    return float(np.median([once, clock(1), clock(1)])) / LOOP, 0.0
  dispatches = int(np.clip(4 * target_seconds / clock(4), 1, 100))
  samples = [clock(2 * dispatches) - clock(dispatches) for _ in range(repeats)]
  low, median, high = np.percentile(np.array(samples) / (dispatches * LOOP), (25, 50, 75))
  return float(median), float(high - low)


def _touch(inputs, outputs):
  """Adds next to nothing, taken from the outputs, to one element of every input."""
  sample = sum(x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(outputs))
  sample = jnp.clip(sample, -1, 1) * 1e-30
  return jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(sample.astype(x.dtype)), inputs)


def _check(outputs):
  for x in jax.tree.leaves(outputs):
    total = float(jnp.sum(jnp.abs(x.astype(jnp.float32))))
    if not np.isfinite(total) or total == 0:
      raise FloatingPointError(f'an output of shape {x.shape} sums to {total}')


def peak_bytes(compiled) -> int:
  """Bytes that a compiled program allocates: arguments, outputs and temporaries."""
  memory = compiled.memory_analysis()
  return (
    memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )  # fmt: skip


def ceilings() -> tuple[float, float]:
  """Bytes a second of a large copy, read plus written, and flops a second of a bf16 product."""
  on_cpu = jax.default_backend() == 'cpu'
  data = jax.random.normal(jax.random.key(0), (2**20 if on_cpu else 2**29,))
  copy = measure(prepare(lambda x: (x * 1.0000001,), (data,)), (data,), repeats=5)
  n = 512 if on_cpu else 8192
  a, b = jax.random.normal(jax.random.key(1), (2, n, n), jnp.bfloat16)
  product = measure(prepare(lambda a, b: (a @ b,), (a, b)), (a, b), repeats=5)
  return 2 * data.nbytes / copy.seconds, 2 * n**3 / product.seconds


def kernels(prepared: Prepared, inputs: tuple, calls: int = 3) -> dict[str, float]:
  """Seconds of each device kernel in one call, the longest first, from the profiler."""
  jax.block_until_ready(prepared.once(*inputs))
  times: dict[str, float] = {}
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(calls):
        jax.block_until_ready(prepared.once(*inputs))
    (file,) = pathlib.Path(folder).rglob('*.xplane.pb')
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
      if not plane.name.startswith('/device:GPU'):
        continue
      for line in plane.lines:
        if 'Stream' in line.name:
          for event in line.events:
            times[event.name] = times.get(event.name, 0) + event.duration_ns * 1e-9 / calls
  return dict(sorted(times.items(), key=lambda item: -item[1]))
