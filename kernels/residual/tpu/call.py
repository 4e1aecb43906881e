"""The differentiable call: layout and padding outside, custom_vjp over the kernels inside."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rla_jax.kernels.residual.tpu import blocks, tokens
from rla_jax.kernels.residual.tpu.backward import backward
from rla_jax.kernels.residual.tpu.blocks import Blocks, Plan, Rule
from rla_jax.kernels.residual.tpu.forward import forward
from rla_jax.kernels.residual.tpu.inverse import prepare

# Names under which jax.checkpoint policies find what the forward pass saves.
SAVED = ('residual_states', 'residual_inverse', 'residual_solutions')


def attend(
  q_BTGK, k_BTGK, v_BTHV, log_decay_BTH, beta_BTH, gamma_BTH, base_BHKV, residual_BHKV, segments_BT,
  *, rule: Rule, sizes: Blocks, interpret,
):  # fmt: skip
  """Pads, lays heads side by side in the lanes, runs the kernels, and undoes both."""
  _, time, keys, key_dim = q_BTGK.shape
  heads, value_dim = v_BTHV.shape[2:]
  # Values decide what is served; queries or keys of a wider type widen the computation.
  dtype = jnp.result_type(q_BTGK, k_BTGK, v_BTHV)
  chunks, block_heads, key_pad, value_pad = blocks.choose(
    sizes, time=time, heads=heads, keys=keys, key_dim=key_dim, value_dim=value_dim,
    itemsize=dtype.itemsize,
  )  # fmt: skip
  plan = Plan(
    rule, sizes.chunk, chunks, block_heads, heads // keys, key_pad, value_pad, sizes.vmem, interpret
  )
  rest = -time % (sizes.chunk * chunks)

  def lanes(x_BTHF, width):
    x_BTHF = jnp.pad(x_BTHF, [(0, 0), (0, rest), (0, 0), (0, width - x_BTHF.shape[3])])
    return x_BTHF.astype(dtype).reshape(*x_BTHF.shape[:2], -1)

  def later(x_BTH):
    return None if x_BTH is None else jnp.pad(x_BTH, [(0, 0), (0, rest), (0, 0)])

  def state(x_BHKV):
    if x_BHKV is None:
      return None
    return jnp.pad(x_BHKV, [(0, 0), (0, 0), (0, key_pad - key_dim), (0, value_pad - value_dim)])

  if segments_BT is not None:
    segments_BT = jnp.pad(segments_BT, [(0, 0), (0, rest)], mode='edge')
  o_BTF, base, residual = _attend(
    plan, lanes(q_BTGK, key_pad), lanes(k_BTGK, key_pad), lanes(v_BTHV, value_pad),
    later(log_decay_BTH), later(beta_BTH), later(gamma_BTH), state(base_BHKV), state(residual_BHKV),
    segments_BT,
  )  # fmt: skip
  o_BTHV = o_BTF.reshape(*o_BTF.shape[:2], heads, value_pad)[:, :time, :, :value_dim]
  def cut(x):
    return None if x is None else x[:, :, :key_dim, :value_dim]
  return o_BTHV.astype(v_BTHV.dtype), cut(base), cut(residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan, q, k, v, log_decay, beta, gamma, base, residual, segments):
  return _run(plan, q, k, v, log_decay, beta, gamma, base, residual, segments, save=False)[0]


def _run(plan, q, k, v, log_decay, beta, gamma, base, residual, segments, *, save):
  # Without a residual the second half of the pair of inverses repeats the first.
  rows = tokens.token_rows(log_decay, beta, beta if gamma is None else gamma, segments, plan.chunk)
  inverse = prepare(plan, k, v, rows) if plan.rule.delta else None
  out = forward(plan, q, k, v, rows, inverse, base, residual, save=save)
  saved = {name: out.pop(name) for name in list(out) if name not in ('o', 'base', 'residual')}
  return (out['o'], out['base'], out.get('residual')), saved | {'inverse': inverse}


def _forward_rule(plan, q, k, v, log_decay, beta, gamma, base, residual, segments):
  out, saved = _run(plan, q, k, v, log_decay, beta, gamma, base, residual, segments, save=True)
  kinds = {'bases': 0, 'residuals': 0, 'inverse': 1, 'f_base': 2, 'f_residual': 2}
  saved = {
    name: None if x is None else checkpoint_name(x, SAVED[kinds[name]]) for name, x in saved.items()
  }
  return out, (q, k, v, log_decay, beta, gamma, segments, saved)


def _backward_rule(plan, saved, cotangents):
  q, k, v, log_decay, beta, gamma, segments, saved = saved
  do, dbase, dresidual = cotangents
  rows = tokens.token_rows(log_decay, beta, beta if gamma is None else gamma, segments, plan.chunk)
  out = backward(plan, q, k, v, rows, saved, do, dbase, dresidual)
  d_log_decay, d_beta, d_gamma = tokens.gate_gradients(out['d_rows'], log_decay, segments)
  return (
    out['dq'].astype(q.dtype), out['dk'].astype(k.dtype), out['dv'], d_log_decay, d_beta,
    None if gamma is None else d_gamma, out['dbase'], out.get('dresidual'), None,
  )  # fmt: skip


_attend.defvjp(_forward_rule, _backward_rule)
