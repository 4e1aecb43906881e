"""Launches both kernels from JAX, with their rules for grad, vmap and many devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import triton

from rla_jax.kernels.residual.gpu.batching import fold_into_batch
from rla_jax.kernels.residual.gpu.launch import launch
from rla_jax.kernels.residual.gpu.partition import over_batch_and_heads
from rla_jax.kernels.short_conv.gpu.backward import backward_kernel
from rla_jax.kernels.short_conv.gpu.forward import forward_kernel


@dataclasses.dataclass(frozen=True)
class Tile:
  """What a program holds: so many channels of whole heads, walked over so many tokens.

  Attributes:
    channels: of the heads beside each other; one head at least.
    tokens: of a program. The backward pass reads W - 1 tokens more and writes 4 W bytes of dtaps a
      channel, so few tokens cost bytes and many leave multiprocessors idle.
    group: tokens whose loads are under way together.
    each: channels of a thread; more of them save instructions and cost registers.
  """

  channels: int
  tokens: int
  group: int
  each: int = 4


FORWARD, BACKWARD = Tile(256, 64, 4), Tile(256, 64, 2)


@dataclasses.dataclass(frozen=True)
class Config:
  """What is fixed when a call is compiled."""

  silu: bool
  norm: bool
  scale: float
  eps: float
  shield: bool
  interpret: bool
  forward: Tile = FORWARD
  backward: Tile = BACKWARD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(config: Config, h_BTHS, taps_WHS, tail_BWHS, documents_BT):
  """As `short_conv`, with the heads split off the arguments."""
  arrays = (h_BTHS, taps_WHS[None], tail_BWHS, documents_BT)
  return _forward(config)(*arrays)


def _convolve_forward(config, *arrays):
  return convolve(config, *arrays), arrays


def _convolve_backward(config, arrays, cotangents):
  dy_BTHS = cotangents[0] if config.shield else cotangents
  h_BTHS, taps_WHS, tail_BWHS, documents_BT = arrays
  dh_BTHS, dtaps_BNWHS, dtail_BWHS = _backward(config)(
    h_BTHS, taps_WHS[None], tail_BWHS, documents_BT, dy_BTHS
  )
  return dh_BTHS, dtaps_BNWHS.sum((0, 1)), dtail_BWHS, None


convolve.defvjp(_convolve_forward, _convolve_backward)


def _over_devices(run, taps, outputs, with_cotangent=False):
  """`run` on the sequences and heads of every device, and with taps of one or of all sequences."""
  # One sequence's taps are those of all; under vmap each of its rows has its own.
  letters = ('BTHS', 'AWHS' if taps.shape[0] == 1 else 'BWHS', 'BWHS', 'BT')
  if with_cotangent:
    letters = (*letters, 'BTHS')
  return over_batch_and_heads(run, letters, outputs)


def _rows_of(taps_AWHS, rows):
  return taps_AWHS if taps_AWHS.shape[0] == 1 else jnp.repeat(taps_AWHS, rows // len(taps_AWHS), 0)


@functools.cache
def _forward(config: Config):
  def run(h, taps, tail, documents):
    y, faults = _launch(forward_kernel, config, config.forward, (h, taps, tail, documents))
    return (y, faults) if config.shield else y

  def call(h, taps, tail, documents):
    taps = _rows_of(taps, len(h))
    outputs = ('BTHS', 'BTH') if config.shield else 'BTHS'
    return _over_devices(run, taps, outputs)(h, taps, tail, documents)

  return fold_into_batch(call)


@functools.cache
def _backward(config: Config):
  def run(h, taps, tail, documents, dy):
    arrays = (h, taps, tail, documents, dy)
    dh, dtaps, dtail = _launch(backward_kernel, config, config.backward, arrays)
    return dh, dtaps, None if tail is None else dtail

  def call(h, taps, tail, documents, dy):
    taps = _rows_of(taps, len(h))
    outputs = ('BTHS', 'BNWHS', 'BWHS')
    return _over_devices(run, taps, outputs, with_cotangent=True)(h, taps, tail, documents, dy)

  return fold_into_batch(call)


def _launch(kernel, config, tile, arrays):
  h, taps, tail, documents, *dy = arrays
  B, T, H, S = h.shape
  width = taps.shape[1]
  block_s = triton.next_power_of_2(S)
  block_h = min(triton.next_power_of_2(H), max(1, tile.channels // block_s))
  tokens = min(tile.tokens, max(16, triton.next_power_of_2(T)))
  tiles = -(-T // tokens)

  def shaped(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)

  outputs, more = [shaped(h)], {}
  if not dy:
    outputs.append(jax.ShapeDtypeStruct(h.shape[:3] if config.shield else (1,), jnp.int8))
    more['SHIELD'] = config.shield
  else:
    outputs.append(jax.ShapeDtypeStruct((B, tiles, width, H, S), jnp.float32))
    # Without a tail the kernel does not touch its gradient.
    outputs.append(jax.ShapeDtypeStruct((1,), h.dtype) if tail is None else shaped(tail))
  return launch(
    kernel,
    *(h, taps, h if tail is None else tail, h if documents is None else documents, *dy),
    *(T, tiles),
    out_shape=outputs,
    grid=(B * tiles * -(-H // block_h),),
    num_warps=max(1, block_h * block_s // (32 * tile.each)),
    num_stages=1,
    interpret=config.interpret,
    H=H,
    S=S,
    BLOCK_H=block_h,
    BLOCK_S=block_s,
    WIDTH=width,
    ROW_TAPS=taps.shape[0] > 1,
    TOKENS=tokens,
    GROUP=tile.group,
    TAIL=tail is not None,
    SEGMENTED=documents is not None,
    SILU=config.silu,
    NORM=config.norm,
    SCALE=config.scale,
    EPS=config.eps,
    **more,
  )
