"""Unit lower triangular systems of a chunk, (I + N) x = y, solved through the explicit inverse.

Exact inverses of small diagonal blocks by substitution, merged by pairs:

    [T1  0 ]      inverse of     [I + N11    0   ]
    [X   T2]                     [  N21   I + N22],      X = -T2 N21 T1

Nothing here forms powers of N over a whole chunk: correlated keys make those overflow.
"""

import jax
import jax.numpy as jnp

from rla_jax.shapes import Array, Float

_BLOCK = 8


def unit_lower_inverse(n_CC: Float[Array, '*batch C C']) -> Float[Array, '*batch C C']:
  """(I + N)^-1 for the strictly lower triangular part of N; the rest of N is ignored."""
  size = n_CC.shape[-1]
  blocks = 1
  while blocks * _BLOCK < size:
    blocks *= 2
  block = -(-size // blocks)
  padding = blocks * block - size
  lead = n_CC.shape[:-2]
  n_CC = jnp.pad(jnp.tril(n_CC, -1), [(0, 0)] * len(lead) + [(0, padding)] * 2)
  inverse = _substitute(_diagonal_blocks(n_CC, block))
  while inverse.shape[-1] < n_CC.shape[-1]:
    block = inverse.shape[-1]
    n21 = _diagonal_blocks(n_CC, 2 * block)[..., block:, :block]
    first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
    corner = -_dot(_dot(second, n21), first)
    above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    inverse = jnp.concatenate([above, jnp.concatenate([corner, second], axis=-1)], axis=-2)
  return inverse[..., 0, :size, :size]


@jax.custom_vjp
def solve_with_inverse(
  inverse_CC: Float[Array, '*batch C C'], n_CC: Float[Array, '*batch C C'], y_CV: Array
) -> Array:
  """x = (I + N)^-1 y for a given inverse; differentiable in N and y by the closed form

  dy = (I + N)^-T dx,   dN = -strict(dy x^T),

  so that no gradient flows through the inverse's own computation.
  """
  del n_CC
  return _dot(inverse_CC, y_CV)


def _solve_forward(inverse_CC, n_CC, y_CV):
  del n_CC
  x_CV = _dot(inverse_CC, y_CV)
  return x_CV, (inverse_CC, x_CV)


def _solve_backward(residuals, dx_CV):
  inverse_CC, x_CV = residuals
  dy_CV = _dot(jnp.swapaxes(inverse_CC, -1, -2), dx_CV)
  dn_CC = -jnp.tril(_dot(dy_CV, jnp.swapaxes(x_CV, -1, -2)), -1)
  return jnp.zeros_like(inverse_CC), dn_CC, dy_CV


solve_with_inverse.defvjp(_solve_forward, _solve_backward)


def _dot(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision='highest')


def _diagonal_blocks(x_CC: Array, block: int) -> Array:
  """The square blocks [..., C // block, block, block] on the diagonal."""
  count = x_CC.shape[-1] // block
  x = x_CC.reshape(*x_CC.shape[:-2], count, block, count, block)
  index = jnp.arange(count)
  return jnp.moveaxis(x[..., index, :, index, :], 0, -3)


def _substitute(n: Array) -> Array:
  """Inverts I + N row by row; meant for a handful of rows."""
  size = n.shape[-1]
  unit = jnp.eye(size, dtype=n.dtype)
  rows = []
  for i in range(size):
    row = jnp.broadcast_to(unit[i], (*n.shape[:-2], size))
    if i:
      done = jnp.stack(rows, axis=-2)
      row = row - jnp.einsum('...j,...jc->...c', n[..., i, :i], done, precision='highest')
    rows.append(row)
  return jnp.stack(rows, axis=-2)
