"""From projections to the heads' q, k and v: convolution, activation, norm and rotation.

On a GPU one kernel does it with its memory traffic alone; elsewhere, and for what the kernel lacks,
XLA does it in float32. `explain_kernel` says which.
"""

import functools
import importlib.util

import jax

from rla_jax.kernels.short_conv import gpu
from rla_jax.layers.conv import short_convolution
from rla_jax.layers.norms import at_least_float32, l2_norm
from rla_jax.layers.rope import rotate
from rla_jax.layers.settings import Settings
from rla_jax.ops.dispatch import candidates, current_platform
from rla_jax.shapes import Array, Float, Segments

ACTIVATIONS = {'silu': jax.nn.silu, 'sigmoid': jax.nn.sigmoid, 'none': lambda x: x}


def head_inputs(
  s: Settings,
  name: str,
  h: Float[Array, 'B T X'],
  taps: Float[Array, 'W X'] | None,
  documents: Segments | None,
  tail: Float[Array, 'B W-1 X'] | None,
  positions: Array,
) -> tuple[Float[Array, 'B T H K'], Array | None]:
  """y = scale a / |a| of every head, a = activation(convolution(h)), rotated; rounded once.

  v has neither norm nor scale nor rotation.

  Args:
    s: the layer; `explain_kernel` has what decides how this is computed.
    name: 'q', 'k' or 'v'.
    h: projections.
    taps: of the convolution, or None.
    documents: index of each token's document, counted from 0.
    tail: the W - 1 inputs before the first token.
    positions: of the tokens [T].

  Returns:
    y, and whether a head of a token was not finite and is zeros instead [B, T, H]. None: nobody has
    looked; with `documents` the kernel does.
  """
  if explain_kernel(s, name, h.shape[1], h.dtype) is not None:
    return _plain(s, name, h, taps, documents, tail, positions), None
  shield, is_value = documents is not None, name == 'v'
  found = gpu.short_conv(
    h, taps, tail, documents, size=_size(s, name), activation=s.activation,
    norm=s.qk_norm and not is_value, scale=_scale(s, name), shield=shield,
  )  # fmt: skip
  return (found[0], found[1] != 0) if shield else (found, None)


def explain_kernel(s: Settings, name: str, length: int, dtype) -> str | None:
  """Why the fused GPU kernel does not compute q, k or v of so many tokens; None: it does.

  It does wherever Triton comes first among the layer's implementations: on GPUs by default.
  """
  first = candidates(s.implementation)[0]
  if first != 'triton':
    return f'the first implementation is {first!r}'
  if current_platform() not in ('gpu', 'cuda'):
    return f'it runs on NVIDIA GPUs; the platform is {current_platform()!r}'
  if importlib.util.find_spec('jax_triton') is None:
    return "jax-triton is not installed (pip install -e '.[cuda]')"
  if s.conv_width is None:
    return 'it is one with the convolution, and the layer has none'
  if s.rope_base is not None and name != 'v':
    return 'it has no rotary positions'
  if length == 1:
    return 'one token of decoding is too little for it'
  return gpu.unsupported(
    width=s.conv_width, size=_size(s, name), dtype=dtype, activation=s.activation
  )


# Elementwise work, so cheaper to repeat in the backward pass than to keep its float32 inside.
@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _plain(s, name, h_BTX, taps_WX, documents_BT, tail_BTX, positions_T):
  B, T, X = h_BTX.shape
  dtype = h_BTX.dtype
  size = _size(s, name)
  h_BTX = h_BTX.astype(at_least_float32(dtype))
  if taps_WX is not None:
    h_BTX = short_convolution(h_BTX, taps_WX, documents_BT, tail_BTX)
  h_BTHX = ACTIVATIONS[s.activation](h_BTX).reshape(B, T, X // size, size)
  if name == 'v':
    return h_BTHX.astype(dtype)
  scale = _scale(s, name)
  h_BTHX = l2_norm(h_BTHX, scale) if s.qk_norm else h_BTHX * scale
  if s.rope_base is not None:
    h_BTHX = rotate(h_BTHX, positions_T, s.rope_base)
  return h_BTHX.astype(dtype)


def _size(s, name):
  return s.value_dim if name == 'v' else s.head_dim


def _scale(s, name):
  if name != 'q':
    return 1.0
  return s.head_dim**-0.5 if s.query_scale is None else s.query_scale
