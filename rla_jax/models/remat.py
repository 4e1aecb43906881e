"""Rematerialisation by name: what a layer keeps for its backward pass.

    none    everything but the product inside SwiGLU
    full    nothing but the layer's input: least memory, one more forward pass
    dots    the results of matrix products with weights; norms, gates and activations are repeated
    names   what layers and kernels mark by `checkpoint_name`: the outputs of the mixers, and what
            the kernels' backward passes need of the forward ones, so that none is run again
    both    the two before this: norms, gates, convolutions and activations alone are repeated
"""

import jax

SAVED_NAMES = (
  'mixer_output',
  'residual_attention_output', 'residual_attention_saved',  # GPU kernels
  'residual_states', 'residual_inverse', 'residual_solutions',  # TPU kernels
)  # fmt: skip

_POLICIES = {
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'names': jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
}
_POLICIES['both'] = jax.checkpoint_policies.save_from_both_policies(
  _POLICIES['dots'], _POLICIES['names']
)


def policy(name: str):
  """The policy for `jax.checkpoint`; None for 'none': no rematerialisation.

  Raises:
    ValueError: an unknown name.
  """
  if name == 'none':
    return None
  if name not in _POLICIES:
    raise ValueError(f'remat is {name!r}; expected one of {["none", *_POLICIES]}')
  return _POLICIES[name]
