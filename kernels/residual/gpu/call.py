"""The operator for JAX, with its gradient."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from rla_jax.kernels.residual.gpu.backward_pass import backward
from rla_jax.kernels.residual.gpu.context import Config
from rla_jax.kernels.residual.gpu.forward_pass import forward

# Names for jax.checkpoint policies: the output, and what the backward pass reads beyond the inputs.
OUTPUT_NAME = 'residual_attention_output'
SAVED_NAME = 'residual_attention_saved'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(config: Config, q, k, v, log_decay, beta, gamma, base, residual, segments):
  """o [B, T, H, V] and the final states; arguments as `residual_attention` takes them."""
  outputs, _ = forward(config, False)(
    q, k, v, log_decay, beta, gamma, base, residual, segments
  )
  return outputs


def _attend_forward(config, q, k, v, log_decay, beta, gamma, base, residual, segments):
  outputs, saved = forward(config, True)(
    q, k, v, log_decay, beta, gamma, base, residual, segments
  )
  o, *final = outputs
  saved = jax.tree.map(lambda x: checkpoint_name(x, SAVED_NAME), saved)
  inputs = (q, k, v, log_decay, beta, gamma, segments)
  return (checkpoint_name(o, OUTPUT_NAME), *final), (inputs, saved)


def _attend_backward(config, kept, cotangents):
  inputs, saved = kept
  return (*backward(config)(inputs, saved, cotangents), None)


attend.defvjp(_attend_forward, _attend_backward)
