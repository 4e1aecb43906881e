"""One decode step: reads and writes each state once, in float32 on the vector unit."""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rla_jax.kernels.residual.tpu import blocks
from rla_jax.kernels.residual.tpu.blocks import Rule

# Old and new states of a grid step, twice over for the pipeline, stay below this.
STATE_BYTES = 16 * 2**20


def step(
  q_BGK, k_BGK, v_BHV, log_decay_BH, beta_BH, gamma_BH, base_BHKV, residual_BHKV,
  *, rule: Rule, interpret,
):  # fmt: skip
  """Equations 1-5 for one token: (o [B, H, V], base, residual or None).

  The states' buffers are reused for the new states where the caller allows it (donation).
  """
  batch, heads, key_dim, value_dim = base_BHKV.shape
  keys = q_BGK.shape[1]
  group = heads // keys
  block = heads_of_block(heads, group, key_dim * value_dim)
  block_keys = max(1, block // group)
  padding = [(0, 0), (0, 0), (0, -key_dim % blocks.LANES)]
  # A dimension of one in front of the lanes: any number of heads is then a legal block.
  def rows(x, pad=None):
    return (x if pad is None else jnp.pad(x, pad))[:, :, None]
  gates = [jnp.exp(log_decay_BH), beta_BH] + ([gamma_BH] if rule.residual else [])
  states = [base_BHKV] + ([residual_BHKV] if rule.residual else [])
  ins = [rows(q_BGK, padding), rows(k_BGK, padding), rows(v_BHV)]
  ins += [rows(jnp.stack(gates, axis=2).astype(jnp.float32)), *states]

  key = pl.BlockSpec(
    (1, block_keys, 1, key_dim + padding[2][1]),
    lambda b, j: (b, j * block // (group * block_keys), 0, 0),
  )
  def of_head(*shape):
    return pl.BlockSpec((1, block, *shape), lambda b, j: (b, j, 0, 0))
  state = of_head(key_dim, value_dim)
  out_shape = [blocks.struct((batch, heads, 1, value_dim), v_BHV.dtype, *ins)]
  out_shape += [blocks.struct(base_BHKV.shape, jnp.float32, *ins) for _ in states]
  o, *states = pl.pallas_call(
    functools.partial(step_kernel, rule=rule, group=group),
    grid=(batch, heads // block),
    in_specs=[key, key, of_head(1, value_dim), of_head(1, len(gates)), *[state for _ in states]],
    out_specs=[of_head(1, value_dim), *[state for _ in states]],
    out_shape=out_shape,
    input_output_aliases={4 + i: 1 + i for i in range(len(states))},
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
    interpret=interpret,
    name='residual_step',
  )(*ins)
  return o[:, :, 0], states[0], states[1] if rule.residual else None


def step_kernel(q_ref, k_ref, v_ref, gates_ref, *refs, rule: Rule, group: int):
  """One grid step.

  In: q, k [1, keys, 1, K], v [1, h, 1, V], gates (a, b, g) [1, h, 1, 3], states [1, h, K, V].
  """
  n = 2 if rule.residual else 1
  states, o_ref, new_states = refs[:n], refs[n], refs[n + 1 :]
  keys, key_dim = q_ref.shape[1], states[0].shape[2]
  both = jnp.concatenate([q_ref[0, :, 0], k_ref[0, :, 0]]).astype(jnp.float32)
  columns = jnp.pad(both, [(0, -both.shape[0] % 8), (0, 0)]).T[:key_dim]
  for h in range(v_ref.shape[1]):
    g = h // group
    q, k = columns[:, g : g + 1], columns[:, keys + g : keys + g + 1]
    v = v_ref[0, h].astype(jnp.float32)
    gate = [gates_ref[0, h, :, i : i + 1] for i in range(n + 1)]
    a = gate[0]

    def write(state, strength, value, read, k=k, a=a):
      value = value - a * read if rule.delta else value
      return a * state + k * (strength * value)

    base = states[0][0, h]
    p = _read(base, k)
    new_base = write(base, gate[1], v, p)
    new_states[0][0, h] = new_base
    if rule.residual:
      residual = states[1][0, h]
      r = v - p if rule.clip is None else jnp.clip(v - p, -rule.clip, rule.clip)
      new_residual = write(residual, gate[2], r, _read(residual, k))
      new_states[1][0, h] = new_residual
      scale = (a, gate[2]) if rule.gated else (1.0, 1.0)
      o = scale[0] * _read(base, q) + scale[1] * _read(new_residual, q)
    else:
      o = _read(new_base, q)
    o_ref[0, h] = o.astype(o_ref.dtype)


def _read(state, column):
  """S^T k: [K, V], [K, 1] -> [1, V]."""
  return jnp.sum(state * column, axis=0, keepdims=True)


def heads_of_block(heads, group, size):
  """The largest divisor of the heads that fits and covers whole groups or divides one."""
  most = max(1, STATE_BYTES // (8 * 4 * size))
  def fits(h):
    return heads % h == 0 and h <= most and (h % group == 0 or group % h == 0)
  return max(h for h in range(1, heads + 1) if fits(h))
