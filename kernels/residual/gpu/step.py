"""One token of decoding for many sequences: reads each state once and writes it once, in place.

All four read-outs of the old states are taken before either is updated, so that nothing waits for
a second pass over a state (S, R are the old states; a, b, g decay, beta, gamma; equation numbers of
`rla_jax.ops.step`):

    p = S^T k      s = S^T q      y = R^T k      z = R^T q      c = k.q
    u = b (v - a p)  or  b v                       write of the base state, delta or additive
    w = g (r - a y)  or  g r,  r = clip(v - p)     write of the residual state
    S' = a S + k u^T            R' = a R + k w^T                                        (3), (4)
    o = a s + g (a z + c w)  |  s + (a z + c w)  |  a s + c u (no residual state)       (5)

The floor is the traffic of the states, 16 K V bytes a head.
"""

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.batching import fold_into_batch
from rla_jax.kernels.residual.gpu.launch import launch
from rla_jax.kernels.residual.gpu.partition import over_batch_and_heads
from rla_jax.shapes import Array, Float

MAX_SIZE = 256  # of K: a program holds two [K, 32] tiles in registers
INPUTS = ('BGK', 'BGK', 'BHV', 'BH', 'BH', 'BH', 'BHKV', 'BHKV')
OUTPUTS = ('BHV', 'BHKV', 'BHKV')


@triton.jit
def step_kernel(
  q_ptr,
  k_ptr,
  v_ptr,
  log_decay_ptr,
  beta_ptr,
  gamma_ptr,
  base_ptr,
  residual_ptr,
  o_ptr,
  new_base_ptr,
  new_residual_ptr,
  HEADS: tl.constexpr,
  GROUP: tl.constexpr,
  KEY: tl.constexpr,
  VALUE: tl.constexpr,
  BLOCK_K: tl.constexpr,
  BLOCK_V: tl.constexpr,
  DELTA: tl.constexpr,
  RESIDUAL: tl.constexpr,
  GATED: tl.constexpr,
  CLIP: tl.constexpr,
):
  """One program a (sequence, head) and a tile of value columns, which are independent."""
  program = tl.program_id(0).to(tl.int64)
  tile = program % tl.cdiv(VALUE, BLOCK_V)
  head = program // tl.cdiv(VALUE, BLOCK_V)  # sequence * HEADS + value head
  key_head = (head // HEADS) * (HEADS // GROUP) + (head % HEADS) // GROUP
  key = tl.arange(0, BLOCK_K)
  value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
  in_key = key < KEY
  in_value = value < VALUE
  in_state = in_key[:, None] & in_value[None, :]
  state = head * KEY * VALUE + key[:, None] * VALUE + value[None, :]

  base = tl.load(base_ptr + state, mask=in_state, other=0.0)
  if RESIDUAL:
    residual = tl.load(residual_ptr + state, mask=in_state, other=0.0)
  q = tl.load(q_ptr + key_head * KEY + key, mask=in_key, other=0.0).to(tl.float32)
  k = tl.load(k_ptr + key_head * KEY + key, mask=in_key, other=0.0).to(tl.float32)
  v = tl.load(v_ptr + head * VALUE + value, mask=in_value, other=0.0).to(tl.float32)
  a = tl.exp(tl.load(log_decay_ptr + head))
  b = tl.load(beta_ptr + head)
  c = tl.sum(k * q, 0)

  p = tl.sum(base * k[:, None], 0)
  s = tl.sum(base * q[:, None], 0)
  u = b * (v - a * p) if DELTA else b * v
  tl.store(new_base_ptr + state, a * base + k[:, None] * u[None, :], mask=in_state)

  if RESIDUAL:
    g = tl.load(gamma_ptr + head)
    r = v - p
    if CLIP is not None:
      r = tl.minimum(tl.maximum(r, -CLIP), CLIP)
    if DELTA:
      r -= a * tl.sum(residual * k[:, None], 0)
    w = g * r
    correction = a * tl.sum(residual * q[:, None], 0) + c * w
    tl.store(new_residual_ptr + state, a * residual + k[:, None] * w[None, :], mask=in_state)
    o = a * s + g * correction if GATED else s + correction
  else:
    o = a * s + c * u
  tl.store(o_ptr + head * VALUE + value, o.to(o_ptr.dtype.element_ty), mask=in_value)


def _blocks(key_dim: int, value_dim: int) -> tuple[int, int, int]:
  """Rows and columns of a program's tile, and its warps: 16 to 32 numbers of a state a thread."""
  block_k = max(16, triton.next_power_of_2(key_dim))
  block_v = min(32, max(16, triton.next_power_of_2(value_dim)))
  return block_k, block_v, max(1, block_k * block_v // 1024)


def residual_attention_step(
  q_BGK: Float[Array, 'B G K'],
  k_BGK: Float[Array, 'B G K'],
  v_BHV: Float[Array, 'B H V'],
  log_decay_BH: Float[Array, 'B H'],
  beta_BH: Float[Array, 'B H'],
  gamma_BH: Float[Array, 'B H'] | None,
  base_BHKV: Float[Array, 'B H K V'],
  residual_BHKV: Float[Array, 'B H K V'] | None,
  *,
  update: str,
  clip: float | None,
  readout: str,
  interpret: bool = False,
) -> tuple[Float[Array, 'B H V'], Float[Array, 'B H K V'], Float[Array, 'B H K V'] | None]:
  """One token of both states. The states' buffers are updated in place where they are donated.

  Args:
    q_BGK: queries; value head h reads query and key head h // (H // G).
    k_BGK: keys.
    v_BHV: values, any floating dtype.
    log_decay_BH: natural log of the decay, float32, <= 0, may be -inf.
    beta_BH: write strength of the base state, float32.
    gamma_BH: strength of the residual state, float32, or None for a base model.
    base_BHKV: S, float32.
    residual_BHKV: R, float32, None exactly if `gamma_BH` is.
    update: 'additive' or 'delta'.
    clip: bound of the residual; None: off.
    readout: 'gated' or 'sum'; without a residual state always S_t^T q_t.
    interpret: run the kernel on the host (on one device, or inside `shard_map`).

  Returns:
    o [B, H, V] in v's dtype, and both new states. Differentiable, by the plain step.

  Raises:
    ValueError: K over 256, or states that are not float32.
  """
  if k_BGK.shape[-1] > MAX_SIZE:
    raise ValueError(f'k has key size {k_BGK.shape[-1]}; the step kernel serves up to {MAX_SIZE}')
  if base_BHKV.dtype != jnp.float32:
    raise ValueError(f'base has dtype {base_BHKV.dtype}; the step kernel expects float32')
  arguments = (q_BGK, k_BGK, v_BHV, log_decay_BH, beta_BH, gamma_BH, base_BHKV, residual_BHKV)
  return _step(update, clip, readout, interpret)(*arguments)


@functools.cache
def _step(update, clip, readout, interpret):
  options = {'update': update, 'clip': clip, 'readout': readout}
  run = functools.partial(_launch, **options, interpret=interpret)
  run = fold_into_batch(over_batch_and_heads(run, INPUTS, OUTPUTS))
  plain = functools.partial(plain_step, **options)
  step = jax.custom_vjp(run)
  step.defvjp(
    lambda *arguments: (run(*arguments), arguments),
    lambda arguments, cotangents: jax.vjp(plain, *arguments)[1](cotangents),
  )
  return step


def _launch(q, k, v, log_decay, beta, gamma, base, residual, *, update, clip, readout, interpret):
  B, G, K = k.shape
  H, V = v.shape[1:]
  has_residual = gamma is not None
  block_k, block_v, num_warps = _blocks(K, V)
  # Without a residual state the kernel does not touch these three: any array stands in.
  gamma, residual = (gamma, residual) if has_residual else (beta, beta)
  out_shape = [jax.ShapeDtypeStruct(v.shape, v.dtype), jax.ShapeDtypeStruct(base.shape, base.dtype)]
  out_shape += [jax.ShapeDtypeStruct(residual.shape if has_residual else (1,), jnp.float32)]
  o, base, residual = launch(
    step_kernel,
    *(q, k, v, log_decay, beta, gamma, base, residual),
    out_shape=out_shape,
    grid=(triton.cdiv(V, block_v) * B * H,),
    num_warps=num_warps,
    num_stages=1,
    aliases={6: 1, 7: 2} if has_residual else {6: 1},
    interpret=interpret,
    HEADS=H,
    GROUP=H // G,
    KEY=K,
    VALUE=V,
    BLOCK_K=block_k,
    BLOCK_V=block_v,
    DELTA=update == 'delta',
    RESIDUAL=has_residual,
    GATED=readout == 'gated',
    CLIP=clip,
  )
  return o, base, residual if has_residual else None


def plain_step(q, k, v, log_decay, beta, gamma, base, residual, *, update, clip, readout):
  """The same in plain JAX, in the states' dtype: for the gradient, and to check kernels by."""
  group = v.shape[1] // k.shape[1]
  q, k = (jnp.repeat(x.astype(base.dtype), group, axis=1) for x in (q, k))
  dtype, v = v.dtype, v.astype(base.dtype)
  decay = jnp.exp(log_decay)[..., None]

  def read(state, x):
    return jnp.einsum('bhkv,bhk->bhv', state, x, precision='highest')

  def write(state, value, rate):
    if update == 'delta':
      value = value - decay * read(state, k)
    return decay[..., None] * state + k[..., None] * (rate[..., None] * value)[..., None, :]

  new_base = write(base, v, beta)
  if gamma is None:
    return read(new_base, q).astype(dtype), new_base, None
  r = v - read(base, k)
  r = r if clip is None else jax.lax.clamp(-clip, r, clip)
  new_residual = write(residual, r, gamma)
  o, correction = read(base, q), read(new_residual, q)
  o = decay * o + gamma[..., None] * correction if readout == 'gated' else o + correction
  return o.astype(dtype), new_base, new_residual
