"""Triton kernels of the short convolution for NVIDIA GPUs, called through jax-triton.

Bound by bandwidth: forward reads h and writes y, backward reads h and dy and writes dh. Importing
this package needs no Triton.
"""

import jax.numpy as jnp

_DTYPES = ('bfloat16', 'float16', 'float32')
_ACTIVATIONS = ('silu', 'none')


def unsupported(*, width: int, size: int, dtype, activation: str) -> str | None:
  """Why the kernels cannot serve a call, None if they can; arguments as for `short_conv`."""
  if not 2 <= width <= 4:
    return f'the Triton kernels convolve 2, 3 or 4 tokens, not {width}'
  if not 1 <= size <= 256:
    return f'the Triton kernels take heads of up to 256 channels, not {size}'
  if jnp.dtype(dtype).name not in _DTYPES:
    return f'the Triton kernels take {", ".join(_DTYPES)}, not {jnp.dtype(dtype).name}'
  if activation not in _ACTIVATIONS:
    return f'the Triton kernels have the activations {", ".join(_ACTIVATIONS)}, not {activation!r}'
  return None


def short_conv(
  h_BTX,
  taps_WX,
  tail_BWX,
  documents_BT,
  *,
  size: int,
  activation: str,
  norm: bool,
  scale: float = 1.0,
  eps: float = 1e-6,
  shield: bool = False,
  interpret: bool = False,
):
  """y = scale a / sqrt(sum a^2 + eps), a = activation(z), z_t = sum_j taps_{W-1-j} h_{t-j}.

  The sum over j = 0 .. W-1 takes tokens of t's own document only, by selection: what is not finite
  in one document does not reach another, forward or backward. The sum under the root is over the
  channels of a head; without `norm`, y = scale a. Everything is float32 inside and rounded once.

  Args:
    h_BTX: inputs, X whole heads: bfloat16, float16 or float32.
    taps_WX: taps, the last one for the current token.
    tail_BWX: the W - 1 inputs before the first token, of document 0, any dtype; None for zeros.
    documents_BT: int32 index of each token's document, counted from 0; None for one document.
    size: channels of a head.
    activation: 'silu' or 'none'.
    norm: whether heads are normalised.
    scale: factor of the result.
    eps: added to the sum of squares.
    shield: a head of a token is zeros where it, or its norm, is not finite; and that is told.
    interpret: run on the host through Triton's interpreter, for tests.

  Returns:
    y [B, T, X / size, size] in h's dtype. Differentiable in h, taps and tail. With `shield`, (y,
    faults), int8 [B, T, X / size], which are 1 there.

  Raises:
    NotImplementedError: the call is `unsupported`.
  """
  reason = unsupported(width=len(taps_WX), size=size, dtype=h_BTX.dtype, activation=activation)
  if reason:
    raise NotImplementedError(reason)
  B, T, X = h_BTX.shape
  heads = (X // size, size)
  if B * T == 0:
    y_BTHS = jnp.zeros((B, T, *heads), h_BTX.dtype)
    return (y_BTHS, jnp.zeros(y_BTHS.shape[:3], jnp.int8)) if shield else y_BTHS

  from rla_jax.kernels.short_conv.gpu import call

  config = call.Config(
    silu=activation == 'silu',
    norm=norm,
    scale=float(scale),
    eps=float(eps),
    shield=shield,
    interpret=interpret,
  )
  return call.convolve(
    config,
    h_BTX.reshape(B, T, *heads),
    taps_WX.astype(jnp.float32).reshape(-1, *heads),
    None if tail_BWX is None else tail_BWX.reshape(B, -1, *heads),
    documents_BT,
  )
