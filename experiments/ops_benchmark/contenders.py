"""The JAX contenders: this library's implementations, and cuDNN flash attention."""

import functools

import jax
import jax.numpy as jnp

from ops_benchmark.problem import Problem
from rla_jax import ops


def implementations(operation: str) -> tuple[str, ...]:
  """Names of those that serve an operation."""
  return ('cudnn',) if operation == 'flash' else ('triton', 'chunked')


def operator(problem: Problem, implementation: str):
  """Function of q, k, v, log_decay, beta, gamma that returns o alone."""
  if problem.operation == 'flash':
    def flash(q, k, v, log_decay, beta, gamma):
      del log_decay, beta, gamma
      attend = jax.nn.dot_product_attention
      return attend(q, k, v, is_causal=True, implementation=implementation)

    return flash
  call = ops.residual_delta_rule if problem.is_delta else ops.residual_linear_attention

  def run(q, k, v, log_decay, beta, gamma):
    gamma = gamma if problem.has_residual else None
    return call(q, k, v, log_decay, beta, gamma, implementation=implementation)[0]

  return run


def build(problem: Problem, implementation: str):
  """The function to time, of what `arguments` returns: forward, or forward and backward."""
  if problem.direction == 'decode':
    return _step(problem, implementation)
  forward = operator(problem, implementation)
  if problem.direction == 'forward':
    return lambda do, *a: (forward(*a),)
  used = {'flash': 3, 'gdn': 5, 'simple_gla': 5}.get(problem.operation, 6)

  def both(do, *a):
    o, pullback = jax.vjp(lambda *x: forward(*x, *a[used:]), *a[:used])
    return (o, *pullback(do))

  return both


def _step(problem, implementation):
  if implementation == 'triton':
    from rla_jax.kernels.residual.gpu.step import residual_attention_step

    update = 'delta' if problem.is_delta else 'additive'
    step = functools.partial(residual_attention_step, update=update, clip=1.0, readout='gated')
  else:
    plain = (
      ops.residual_delta_rule_step if problem.is_delta else ops.residual_linear_attention_step
    )

    def step(*arguments):
      *token, base, residual = arguments
      o, state = plain(*token, ops.ResidualState(base, residual))
      return o, state.base, state.residual

  if problem.has_residual:
    return step

  def base_step(q, k, v, log_decay, beta, base):
    return step(q, k, v, log_decay, beta, None, base, None)[:2]

  return base_step


def arguments(problem: Problem, inputs: dict[str, jax.Array]) -> tuple:
  """What the function takes: do and the inputs, or a token of every sequence and the states."""
  names = ('q', 'k', 'v', 'log_decay', 'beta', 'gamma')
  if problem.direction != 'decode':
    do = jax.random.normal(jax.random.key(7), inputs['v'].shape, inputs['v'].dtype)
    return (do, *(inputs[n] for n in names))
  shape = (problem.batch, problem.heads, problem.size, problem.size)
  base = jax.random.normal(jax.random.key(3), shape, jnp.float32) * 0.1
  tokens = tuple(inputs[n][:, 0] for n in names)
  return (*tokens, base, base[::-1]) if problem.has_residual else (*tokens[:5], base)
