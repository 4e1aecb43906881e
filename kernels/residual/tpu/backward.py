"""Backward pass: one reverse sweep over the chunks carries the gradients of both states.

The adjoint of one chunk, in the notation of forward.py, c being the clip:

    dW = Mr^T dO + lam (K dR')                dz = T_g^T (g dW)         dD = dz where |V - P| < c
    dU = Ms^T dO + lam (K dS') - Px^T dD      dy = T_b^T (b dU)         dV = dD + dy
    dX = -Ex dD - E dy                        dY = -E dz                (additive: no dy, dz terms)
    dg = F_g . (dW - A^T dz) + its read-out   db = F_b . (dU - A^T dy)
    NQ = dMs + dMr on the decays              NK = -Lx ((dD + a dy) U^T + a dz W^T)
    dQ = NQ K + e_s dO S^T + e_r dO R^T
    dK = NQ^T Q + (NK + NK^T) K + dX S^T + dY R^T + lam (U dS'^T + W dR'^T)
    dS = exp(G_C) dS' + Q^T (e_s dO) + K^T dX,  dR = exp(G_C) dR' + Q^T (e_r dO) + K^T dY

Moving a gate to the right of the inverse leaves dg and db without a division by the gate. Keys and
queries are stacked, [K; Q], wherever both meet the same operand.

Precision: as in the forward pass. The gradients of the decays are small differences of large sums:
rows and columns are summed from the same float32 tile, so that what cancels does so exactly.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from rla_jax.kernels.residual.tpu import blocks, tiles, tokens
from rla_jax.kernels.residual.tpu.blocks import Plan
from rla_jax.kernels.residual.tpu.forward import read_out
from rla_jax.kernels.residual.tpu.tiles import NT, TN, dot, iota


def backward(
  plan: Plan, q_BTF, k_BTF, v_BTF, rows_BHNRC, saved, do_BTF, dbase_BHKV, dresidual_BHKV
):
  """Runs the backward kernel.

  Args:
    saved: dict of what the forward kernel saved and of the inverse; None where there is none.
    do_BTF, dbase_BHKV, dresidual_BHKV: cotangents of the output and the final states.

  Returns:
    dict of dq, dk [B, T, G K], dv, d_rows (tokens.py's gradient rows), dbase, dresidual.
  """
  rule, grid = plan.rule, plan.grid(v_BTF)
  spec = plan.specs(blocks=grid[2])
  like = (q_BTF, k_BTF, v_BTF, rows_BHNRC, do_BTF, dbase_BHKV)
  shared = (*v_BTF.shape[:2], grid[1] * plan.keys * plan.key_dim)
  # Several value heads add up in one key head: in float32, across grid steps outside the kernel.
  partial = q_BTF.dtype if plan.group == 1 else jnp.float32
  outputs = {
    'dq': ('partial', shared, partial),
    'dk': ('partial', shared, partial),
    'dv': ('value', v_BTF.shape, v_BTF.dtype),
    'd_rows': ('rows', rows_BHNRC.shape, jnp.float32),
    'dbase': ('state', dbase_BHKV.shape, jnp.float32),
  }
  if rule.residual:
    outputs['dresidual'] = ('state', dbase_BHKV.shape, jnp.float32)
  inputs = {'q': (q_BTF, 'key'), 'k': (k_BTF, 'key'), 'v': (v_BTF, 'value')}
  inputs |= {'rows': (rows_BHNRC, 'rows'), 'inverse': (saved['inverse'], 'inverse')}
  inputs |= {name: (saved.get(name), 'states') for name in ('bases', 'residuals')}
  inputs |= {name: (saved.get(name), 'value') for name in ('f_base', 'f_residual')}
  inputs |= {'do': (do_BTF, 'value'), 'dbase': (dbase_BHKV, 'state')}
  inputs |= {'dresidual': (dresidual_BHKV, 'state')}
  inputs = {name: pair for name, pair in inputs.items() if pair[0] is not None}
  out = pl.pallas_call(
    functools.partial(backward_kernel, plan=plan, inputs=tuple(inputs), outputs=tuple(outputs)),
    grid=grid,
    in_specs=[spec[kind] for _, kind in inputs.values()],
    out_specs=[spec[kind] for kind, _, _ in outputs.values()],
    out_shape=[blocks.struct(shape, dtype, *like) for _, shape, dtype in outputs.values()],
    name='residual_backward',
    **plan.params(sequential=True),
  )(*(x for x, _ in inputs.values()))
  out = dict(zip(outputs, out))
  if plan.group > plan.heads:
    def fold(x):
      return x.reshape(*x.shape[:2], -1, plan.group // plan.heads, plan.key_dim).sum(3)
    out |= {name: fold(out[name]).reshape(q_BTF.shape) for name in ('dq', 'dk')}
  return out


def backward_kernel(*refs, plan: Plan, inputs: tuple[str, ...], outputs: tuple[str, ...]):
  """One grid step; references by name as `backward` lists them, blocks as in `Plan.specs`."""
  ins = dict(zip(inputs, refs))
  outs = dict(zip(outputs, refs[len(inputs) :]))

  @pl.when(pl.program_id(2) == 0)
  def _():
    for name in ('dbase', 'dresidual'):
      if name in outs:
        outs[name][...] = ins[name][...]

  def body(i, _):
    n = plan.chunks - 1 - i
    scalars = tiles.scalars(ins['rows'], n, plan.heads)
    tiles.interleave(_chunk(ins, outs, c, n, h, plan) for h, c in enumerate(scalars))
    return 0

  jax.lax.fori_loop(0, plan.chunks, body, 0)


def _chunk(ins, outs, c, n, h, plan):
  """One chunk of one head; a generator that yields between dependent products."""
  rule, chunk, at = plan.rule, plan.chunk, plan.tokens_of(n)
  def values(name):
    return ins[name][0, at, plan.values_of(h)]
  q, k = ins['q'][0, at, plan.keys_of(h)], ins['k'][0, at, plan.keys_of(h)]
  dtype = q.dtype
  v, do = values('v').astype(jnp.float32), values('do')
  a, b, g, from_start, to_end = (
    c.column(i, plan.value_dim)
    for i in (tokens.DECAY, tokens.BETA, tokens.GAMMA, tokens.FROM_START, tokens.TO_END)
  )
  e, keep = a * from_start, c.whole_chunk()
  multiply = functools.partial(dot, dtype=dtype)

  kq = jnp.concatenate([k, q])
  gram = multiply(kq, jnp.concatenate([k, k]), NT)
  base, d_base = ins['bases'][0, h, n], outs['dbase'][0, h]
  d_base_low = d_base.astype(dtype)
  kq_base = multiply(kq, base)
  k_base, q_base = kq_base[:chunk], kq_base[chunk:]
  k_dbase = multiply(k, d_base_low)
  if rule.residual:
    residual, d_residual = ins['residuals'][0, h, n], outs['dresidual'][0, h]
    d_residual_low = d_residual.astype(dtype)
    if rule.delta:
      kq_residual = multiply(kq, residual)
      k_residual, q_residual = kq_residual[:chunk], kq_residual[chunk:]
    else:
      q_residual = multiply(q, residual)
    k_dresidual = multiply(k, d_residual_low)
  yield

  # What the forward pass had: U, W and the mask of the clip.
  decay = tiles.decay_pair(c, chunk)
  unit, gate, read_base, read_residual = read_out(c, decay, plan)
  decay = decay[:, :chunk]
  unit_scores = unit * gram[chunk:]
  scores = unit_scores * gate
  px = decay * gram[:chunk, :chunk]
  f_base = values('f_base').astype(jnp.float32) if rule.delta else v
  u = b * f_base
  uw = u.astype(dtype)
  if rule.residual:
    # As the forward pass rounds it, for the same mask.
    p = from_start * k_base + multiply(px * c.row(tokens.BETA), f_base)
    yield
    d = v - p
    clipped = d if rule.clip is None else jnp.clip(d, -rule.clip, rule.clip)
    f_residual = values('f_residual').astype(jnp.float32) if rule.delta else clipped
    w = g * f_residual
    uw = jnp.concatenate([uw, w.astype(dtype)])
  else:
    unit, unit_scores, scores = unit[:, :chunk], unit_scores[:, :chunk], scores[:, :chunk]
  d_scores = multiply(do, uw, NT)
  d_uw = multiply(scores, do, TN)
  px_t = px.T
  if rule.delta:
    inverse_t = ins['inverse'][0, h, n].astype(jnp.float32).T
  yield

  du = d_uw[:chunk] + to_end * k_dbase
  d_gamma = jnp.zeros((chunk, 1), jnp.float32)
  if rule.residual:
    dw = d_uw[chunk:] + to_end * k_dresidual
    dz, d_strength = g * dw, dw
    if rule.delta:
      dz = multiply(inverse_t[chunk:], dz)
      yield
      d_strength = dw - multiply(px_t, a * dz)
    d_gamma = _row_sums(f_residual * d_strength)
    dd = dz if rule.clip is None else jnp.where(jnp.abs(d) < rule.clip, dz, 0.0)
    du = du - multiply(px_t, dd)
    yield
  dy, d_strength = b * du, du
  if rule.delta:
    dy = multiply(inverse_t[:chunk], dy)
    yield
    d_strength = du - multiply(px_t, a * dy)
  d_beta = _row_sums(f_base * d_strength)
  dv = dy + dd if rule.residual else dy
  outs['dv'][0, at, plan.values_of(h)] = dv.astype(outs['dv'].dtype)

  # Gradients of the tiles that read the keys: Px by its rows' Gx, A = a Px by their G.
  u_low, do = uw[:chunk], do.astype(jnp.float32)
  d_px, d_a = [], []
  if rule.residual and rule.delta:
    both = multiply(jnp.concatenate([dd, a * dy]), u_low, NT)
    d_px, d_a = [-both[:chunk]], [-both[chunk:] - multiply(a * dz, uw[chunk:], NT)]
  elif rule.residual:
    d_px = [-multiply(dd, u_low, NT)]
  elif rule.delta:
    d_a = [-multiply(a * dy, u_low, NT)]
  nk = [x * decay for x in (d_px + d_a)]
  nq = d_scores * unit * gate
  if rule.residual:
    nq = nq[:, :chunk] + nq[:, chunk:]

  # Through the keys and queries, and through the states: [dK; dQ] where both meet one operand.
  from_base = read_base * do
  dx = [-from_start * dd] if rule.residual else []
  dx += [-e * dy] if rule.delta else []
  left = jnp.concatenate([sum(nk), nq]) if nk else nq
  into_base = jnp.concatenate([sum(dx), from_base]) if dx else from_base
  meets = kq if nk else q
  dkq = multiply(left, k) + multiply(into_base, base, NT)
  dk, dq = dkq[:-chunk], dkq[-chunk:]
  dk_more = multiply(left, meets, TN) + multiply(to_end * u, d_base_low, NT)
  dk = dk + dk_more if nk else dk_more
  new_dbase = multiply(meets, into_base, TN)
  outs['dbase'][0, h] = jnp.where(keep > 0, keep * d_base, 0.0) + new_dbase
  if rule.residual:
    from_residual = read_residual * do
    into = jnp.concatenate([-e * dz, from_residual]) if rule.delta else from_residual
    dkq = multiply(into, residual, NT)
    dq = dq + dkq[-chunk:]
    dk = dk + multiply(to_end * w, d_residual_low, NT)
    dk = dk + dkq[:chunk] if rule.delta else dk
    new_dresidual = multiply(kq if rule.delta else q, into, TN)
    outs['dresidual'][0, h] = jnp.where(keep > 0, keep * d_residual, 0.0) + new_dresidual
  _store_shared(outs['dq'], dq, at, h, plan)
  _store_shared(outs['dk'], dk, at, h, plan)
  yield

  # Gradients of the decays: everything with exponent G_i - G_j or G_i in `upto`, Gx_i in `before`.
  read = unit_scores * d_scores
  tile_upto, tile_before = [x * px for x in d_a], [x * px for x in d_px]
  row_upto, row_before = [], []
  carried = u * k_dbase
  kept = _total(d_base * base.astype(jnp.float32))
  if rule.residual:
    first, second = read[:, :chunk], read[:, chunk:]
    read_row = from_base * q_base
    residual_row = e * q_residual * do
    if rule.gated:
      d_gamma = d_gamma + _row_sums(residual_row) + _row_sums(second)
      tile_upto += [first, c.column(tokens.GAMMA, chunk) * second]
      row_upto += [read_row, g * residual_row]
    else:
      tile_before += [first]
      tile_upto += [second]
      row_before += [read_row]
      row_upto += [residual_row]
    row_before += [-from_start * k_base * dd]
    if rule.delta:
      row_upto += [-e * (dy * k_base + dz * k_residual)]
    carried = carried + w * k_dresidual
    kept = kept + _total(d_residual * residual.astype(jnp.float32))
  else:
    tile_upto += [read]
    row_upto += [from_base * q_base]
    if rule.delta:
      row_upto += [-e * (dy * k_base)]
  carried = to_end * carried
  at_end = _total(carried) + keep * kept
  d_upto = _row_sums(sum(tile_upto)) + _row_sums(sum(row_upto) - carried)
  d_before = jnp.zeros((chunk, 1), jnp.float32)
  if rule.residual:
    d_before = _row_sums(sum(tile_before)) + _row_sums(sum(row_before))
  columns = -jnp.sum(sum(tile_upto + tile_before), axis=0, keepdims=True)
  columns = columns + jnp.where(iota((1, chunk), 1) == chunk - 1, at_end, 0.0)

  lane = iota((chunk, tokens.ROWS), 1)
  packed = jnp.zeros((chunk, tokens.ROWS), jnp.float32)
  for index, column in (
    (tokens.D_UPTO, d_upto), (tokens.D_BEFORE, d_before),
    (tokens.D_BETA, d_beta), (tokens.D_GAMMA, d_gamma),
  ):  # fmt: skip
    packed = jnp.where(lane == index, column, packed)
  is_upto = iota((tokens.ROWS, chunk), 0) == tokens.D_UPTO
  outs['d_rows'][0, h, n] = packed.T + jnp.where(is_upto, columns, 0.0)


def _row_sums(x):
  return jnp.sum(x, axis=1, keepdims=True)


def _total(x):
  return jnp.sum(jnp.sum(x, axis=0, keepdims=True), axis=1, keepdims=True)


def _store_shared(ref, x, at, h, plan):
  """Stores a key head's gradient; the value heads that share it add up."""
  if h % plan.group and plan.heads > 1:
    x = x + ref[0, at, plan.keys_of(h)]
  ref[0, at, plan.keys_of(h)] = x.astype(ref.dtype)
