"""AdamW: its schedule, its mask of what decays, its update."""

import re

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rla_jax.shapes import Array, Float

# Weight decay is for the matrices that multiply activations. Norms, biases, convolution taps and
# the gates' rates (A_log, dt_bias) keep their scale: decay would change what they mean.
DECAYED = r'(_proj|embedding|head|kernel)$'


def learning_rate(step: Float[Array, ''], config: ConfigDict) -> Float[Array, '']:
  """Rate of the update after which `step` + 1 steps are done.

  It rises linearly to its peak in warmup_steps steps, then falls along half a cosine to its final
  value at the last step.

  Args:
    step: steps done before, from 0.
    config: the whole config; reads `steps` and `optimizer`.
  """
  o = config.optimizer
  done = jnp.asarray(step, jnp.float32) + 1.0
  part = jnp.clip((done - o.warmup_steps) / max(config.steps - o.warmup_steps, 1), 0.0, 1.0)
  cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * part))
  falling = o.final_learning_rate + (o.learning_rate - o.final_learning_rate) * cosine
  return jnp.minimum(done / max(o.warmup_steps, 1), 1.0) * falling


def decays(params) -> dict:
  """Which parameters weight decay is for: a tree of bools, by `DECAYED`."""

  def decayed(path, _):
    return bool(re.search(DECAYED, jax.tree_util.keystr(path, simple=True, separator='/')))

  return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """AdamW for a rate of 1: its updates are to be multiplied by minus the learning rate.

  Reference:
    Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv:1711.05101.
  """
  o = config.optimizer
  return optax.chain(
    optax.scale_by_adam(o.beta1, o.beta2, o.eps),
    optax.add_decayed_weights(o.weight_decay, decays),
  )
