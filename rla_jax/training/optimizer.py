"""AdamW and Muon: their schedule, the mask of what decays, their update."""

import re

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from rla_jax.shapes import Array, Float

# Weight decay is for the matrices that multiply activations. Norms, biases, convolution taps and
# the gates' rates (A_log, dt_bias) keep their scale: decay would change what they mean.
DECAYED = r'(_proj|embedding|head|kernel)$'

# Muon is for matrices of hidden layers: those of the blocks, except projections to one number a
# head. Their first axis counts layers, which are orthogonalised one by one.
_MUON = r'^blocks/.*(?<!beta)(?<!gamma)(?<!/decay)_proj$'
# RMS of an orthogonalised update, times sqrt(larger side): AdamW's, so that one rate serves both.
_MUON_RMS = 0.2


def learning_rate(step: Float[Array, ''], config: ConfigDict) -> Float[Array, '']:
  """Rate of the update after which `step` + 1 steps are done.

  It rises linearly to its peak in warmup_steps steps, then falls to its final value at the last
  step: along half a cosine, or (wsd) linearly over the last decay_steps after a constant rate.

  Args:
    step: steps done before, from 0.
    config: the whole config; reads `steps` and `optimizer`.
  """
  o = config.optimizer
  done = jnp.asarray(step, jnp.float32) + 1.0
  if o.schedule == 'wsd':
    length = o.decay_steps or max(config.steps // 10, 1)
    left = jnp.clip((config.steps - done) / length, 0.0, 1.0)
  else:
    part = jnp.clip((done - o.warmup_steps) / max(config.steps - o.warmup_steps, 1), 0.0, 1.0)
    left = 0.5 * (1.0 + jnp.cos(jnp.pi * part))
  falling = o.final_learning_rate + (o.learning_rate - o.final_learning_rate) * left
  return jnp.minimum(done / max(o.warmup_steps, 1), 1.0) * falling


def decays(params) -> dict:
  """Which parameters weight decay is for: a tree of bools, by `DECAYED`."""

  def decayed(path, _):
    return bool(re.search(DECAYED, jax.tree_util.keystr(path, simple=True, separator='/')))

  return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
  """AdamW or Muon for a rate of 1: updates are to be multiplied by minus the learning rate.

  Reference:
    Loshchilov, Hutter: Decoupled Weight Decay Regularization, arXiv:1711.05101.
    Jordan et al.: Muon, kellerjordan.github.io/posts/muon; its scale: Liu et al., arXiv:2502.16982.
  """
  o = config.optimizer
  update = optax.scale_by_adam(o.beta1, o.beta2, o.eps)
  if o.name == 'muon':
    muon = optax.chain(
      optax.contrib.scale_by_muon(beta=o.muon_beta, weight_dimension_numbers=_matrices),
      optax.stateless(_like_adam),
    )
    update = optax.partition({'muon': muon, 'adamw': update}, muon_labels)
  return optax.chain(update, optax.add_decayed_weights(o.weight_decay, decays))


def muon_labels(params) -> dict:
  """'muon' or 'adamw' for every parameter."""

  def label(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return 'muon' if re.search(_MUON, name) else 'adamw'

  return jax.tree_util.tree_map_with_path(label, params)


def _matrices(params):
  """The last two axes [inputs, outputs] are the matrix; those before count layers."""
  return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), params)


def _like_adam(updates, params=None):
  del params
  return jax.tree.map(lambda u: _MUON_RMS * max(u.shape[-2:]) ** 0.5 * u, updates)
