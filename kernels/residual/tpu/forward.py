"""Forward pass: both states carried through the chunks of a sequence, in on-chip memory.

Equation numbers are those of the chunk form: with E = exp(G), Ex = exp(Gx), both from the scalars
of tokens.py, T_b and T_g from inverse.py (the identity for the additive update),

    X = K S,  Y = K R
    F_b = T_b (V - E X),  U = b F_b              P = Ex X + Px U,  r = clip(V - P)
    F_g = T_g (r - E Y),  W = g F_g              O = e_s (Q S) + e_r (Q R) + Ms U + Mr W
    S' = exp(G_C) S + K^T (lam U),               R' = exp(G_C) R + K^T (lam W)

Precision: float32 inputs multiply at full float32 precision throughout. bfloat16 inputs multiply in
one bf16 pass; the states, the scalars, the residual, all sums and every elementwise operation are
float32, and a state is rounded only as an operand. With the delta rule, whose predictions feed
back, Px and the keys that write R have twice the digits: with correlated keys these two decide.
F is saved as it was rounded for the products, and the backward pass repeats the operations up to
V - P: it meets the same clip mask.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rla_jax.kernels.residual.tpu import blocks, tiles, tokens
from rla_jax.kernels.residual.tpu.blocks import Plan
from rla_jax.kernels.residual.tpu.tiles import NT, dot, dot_split, iota


def forward(
  plan: Plan, q_BTF, k_BTF, v_BTF, rows_BHNRC, inverse, base_BHKV, residual_BHKV, *, save: bool
):
  """Runs the forward kernel: a dict of `o`, `base`, `residual` and, with `save`, what it saved."""
  rule, like = plan.rule, (q_BTF, k_BTF, v_BTF, rows_BHNRC, base_BHKV)
  spec = plan.specs()
  batch, heads, n_chunks = rows_BHNRC.shape[:3]
  dtype, state = q_BTF.dtype, (batch, heads, plan.key_dim, plan.value_dim)
  states = (batch, heads, n_chunks, plan.key_dim, plan.value_dim)
  outputs = {
    'o': (True, 'value', v_BTF.shape, v_BTF.dtype),
    'base': (True, 'state', state, jnp.float32),
    'residual': (rule.residual, 'state', state, jnp.float32),
    'bases': (save, 'states', states, dtype),
    'residuals': (save and rule.residual, 'states', states, dtype),
    'f_base': (save and rule.delta, 'value', v_BTF.shape, dtype),
    'f_residual': (save and rule.delta and rule.residual, 'value', v_BTF.shape, dtype),
  }
  outputs = {name: row[1:] for name, row in outputs.items() if row[0]}
  inputs = {'q': (q_BTF, 'key'), 'k': (k_BTF, 'key'), 'v': (v_BTF, 'value')}
  inputs |= {'rows': (rows_BHNRC, 'rows'), 'inverse': (inverse, 'inverse')}
  inputs |= {'base': (base_BHKV, 'state'), 'residual': (residual_BHKV, 'state')}
  inputs = {name: pair for name, pair in inputs.items() if pair[0] is not None}
  out = pl.pallas_call(
    functools.partial(forward_kernel, plan=plan, inputs=tuple(inputs), outputs=tuple(outputs)),
    grid=plan.grid(v_BTF),
    in_specs=[spec[kind] for _, kind in inputs.values()],
    out_specs=[spec[kind] for kind, _, _ in outputs.values()],
    out_shape=[blocks.struct(shape, dtype, *like) for _, shape, dtype in outputs.values()],
    name='residual_forward_saving' if save else 'residual_forward',
    **plan.params(sequential=True),
  )(*(x for x, _ in inputs.values()))
  return dict(zip(outputs, out))


def forward_kernel(*refs, plan: Plan, inputs: tuple[str, ...], outputs: tuple[str, ...]):
  """One grid step; references by name as `forward` lists them, blocks as in `Plan.specs`."""
  rule = plan.rule
  ins, outs = dict(zip(inputs, refs)), dict(zip(outputs, refs[len(inputs) :]))

  @pl.when(pl.program_id(2) == 0)
  def _():
    outs['base'][...] = ins['base'][...]
    if rule.residual:
      outs['residual'][...] = ins['residual'][...]

  def body(n, _):
    scalars = tiles.scalars(ins['rows'], n, plan.heads)
    tiles.interleave(_chunk(ins, outs, c, n, h, plan) for h, c in enumerate(scalars))
    return 0

  jax.lax.fori_loop(0, plan.chunks, body, 0)


def _chunk(ins, outs, c, n, h, plan):
  """One chunk of one head; a generator that yields between dependent products."""
  rule, chunk, at = plan.rule, plan.chunk, plan.tokens_of(n)
  q, k = ins['q'][0, at, plan.keys_of(h)], ins['k'][0, at, plan.keys_of(h)]
  v = ins['v'][0, at, plan.values_of(h)].astype(jnp.float32)
  dtype = q.dtype
  kq = jnp.concatenate([k, q])
  a = c.column(tokens.DECAY, plan.value_dim)
  from_start = c.column(tokens.FROM_START, plan.value_dim)

  base = outs['base'][0, h]
  base_low = base.astype(dtype)
  if 'bases' in outs:
    outs['bases'][0, h, n] = base_low
  kq_base = dot(kq, base_low, dtype=dtype)
  k_base, q_base = kq_base[:chunk], kq_base[chunk:]
  gram = dot(kq, jnp.concatenate([k, k]), NT, dtype=dtype)
  if rule.residual:
    residual = outs['residual'][0, h]
    residual_low = residual.astype(dtype)
    if 'residuals' in outs:
      outs['residuals'][0, h, n] = residual_low
    kq_residual = dot(kq, residual_low, dtype=dtype)
    k_residual, q_residual = kq_residual[:chunk], kq_residual[chunk:]
  yield

  decay = tiles.decay_pair(c, chunk)
  unit, gate, read_base, read_residual = read_out(c, decay, plan)
  # The gates of what is written go to the lanes of the tiles, so that F is an operand as it is.
  scores = unit * gram[chunk:] * gate * c.rows(tokens.BETA, tokens.GAMMA)
  o = read_base * q_base
  k_base = from_start * k_base
  f_base = v
  if rule.delta:
    inverse = ins['inverse'][0, h, n]
    f_base = dot(inverse[:, :chunk], v - a * k_base, dtype=dtype)
    yield
  f_base = f_base.astype(dtype)
  if 'f_base' in outs:
    outs['f_base'][0, at, plan.values_of(h)] = f_base
  k_pair = (jnp.concatenate([k, k]) if rule.delta and rule.residual else k).T.astype(jnp.float32)
  k_t = k_pair[:, :chunk]
  to_end, keep = c.row(tokens.TO_END), c.whole_chunk()
  writes = dot(k_t * (to_end * c.row(tokens.BETA)), f_base, dtype=dtype)
  outs['base'][0, h] = jnp.where(keep > 0, keep * base, 0.0) + writes
  if not rule.residual:
    o = o + dot(scores[:, :chunk], f_base, dtype=dtype)
    outs['o'][0, at, plan.values_of(h)] = o.astype(outs['o'].dtype)
    return

  p = k_base + predict_within(c, decay, gram[:chunk], f_base, plan)
  yield
  f_residual = v - p if rule.clip is None else jnp.clip(v - p, -rule.clip, rule.clip)
  if rule.delta:
    k_residual = a * from_start * k_residual
    f_residual = dot(inverse[:, chunk:], f_residual - k_residual, dtype=dtype)
    yield
  f_residual = f_residual.astype(dtype)
  if 'f_residual' in outs:
    outs['f_residual'][0, at, plan.values_of(h)] = f_residual
  if rule.delta:
    strength = c.rows(tokens.TO_END, tokens.TO_END) * c.rows(tokens.GAMMA, tokens.GAMMA)
    writes = dot_split(k_pair * strength, f_residual, dtype=dtype)
  else:
    writes = dot(k_t * (to_end * c.row(tokens.GAMMA)), f_residual, dtype=dtype)
  outs['residual'][0, h] = jnp.where(keep > 0, keep * residual, 0.0) + writes
  o = o + read_residual * q_residual
  o = o + dot(scores, jnp.concatenate([f_base, f_residual]), dtype=dtype)
  outs['o'][0, at, plan.values_of(h)] = o.astype(outs['o'].dtype)


def predict_within(c: tiles.Scalars, decay, gram, f_base, plan: Plan):
  """Px U: what the chunk's own writes predict, from decay = [Lx | Lx] and gram = [K K^T | K K^T].

  Both passes form it here, so that they meet the same clip mask.
  """
  px = decay * gram * c.rows(tokens.BETA, tokens.BETA)
  if plan.rule.delta:
    return dot_split(px, f_base, dtype=f_base.dtype)
  return dot(px[:, : plan.chunk], f_base, dtype=f_base.dtype)


def read_out(c: tiles.Scalars, decay, plan: Plan):
  """Equation 9 as factors of Q K^T, Q S and Q R, from decay = [Lx | Lx] [C, 2C].

  Returns (unit, gate, scale of Q S, scale of Q R). The scores [Ms | Mr] are unit * QK * gate with
  unit [strict(L) | lower(L)] and gate [1 | g]; the scales are E and g E. For the plain sum of
  read-outs: unit [strict(Lx) | lower(L)], gate 1, scales Ex and E. Without a residual the first
  half is lower(L) and the scale E.
  """
  rule, chunk = plan.rule, plan.chunk
  a, g, from_start = (
    functools.partial(c.column, i) for i in (tokens.DECAY, tokens.GAMMA, tokens.FROM_START)
  )
  lane = iota(decay.shape, 1)
  is_second = lane >= chunk
  is_diagonal = iota(decay.shape, 0) == lane % chunk
  lower = a(2 * chunk) * decay
  first = from_start(plan.value_dim)
  e = a(plan.value_dim) * first
  if not rule.residual:
    return jnp.where(is_diagonal, 1.0, lower), 1.0, e, None
  if rule.gated:
    unit = jnp.where(is_diagonal & is_second, 1.0, lower)
    return unit, jnp.where(is_second, g(2 * chunk), 1.0), e, g(plan.value_dim) * e
  return jnp.where(is_second, jnp.where(is_diagonal, 1.0, lower), decay), 1.0, first, e
