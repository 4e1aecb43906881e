"""Pallas kernels for TPU: residual linear attention and the residual delta rule, both states fused."""

import jax.numpy as jnp

from rla_jax.kernels.residual.tpu.blocks import Blocks, Rule
from rla_jax.kernels.residual.tpu.call import SAVED, attend


def residual_attention(
  q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, gamma_BTH, base_BHKV, residual_BHKV, segments_BT,
  *, update, clip, readout, chunk_size=None, interpret=False,
):  # fmt: skip
  rule = Rule(update == 'delta', gamma_BTH is not None, readout == 'gated', clip)
  return attend(
    q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, gamma_BTH, base_BHKV, residual_BHKV,
    segments_BT, rule=rule, sizes=Blocks(chunk=chunk_size or 64), interpret=interpret,
  )  # fmt: skip
