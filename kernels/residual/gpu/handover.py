"""How programs of one launch follow others of it, without a chance of waiting for ever."""

import triton
import triton.language as tl

from rla_jax.kernels.residual.gpu.blocks import MULTIPROCESSORS

GROUP = tl.constexpr(MULTIPROCESSORS)
HANDED_AT_A_TIME = 8  # chunks: a loop of so many is pipelined, and begun anew after them


@triton.jit
def take_turn(flags_ptr):
  """(whether this program follows another, the number of what both walk, address of its flag).

  Half of the programs lead, and a GROUP of them starts before those that follow it: turns are taken
  in the order in which programs start, as that of a grid is nowhere promised. So whom a program
  waits for runs or is done. `flags` starts as zeros: a counter, then a flag for everyone who leads.
  """
  walks = tl.num_programs(0) // 2
  turn = tl.atomic_add(flags_ptr, 1)
  first = turn // (2 * GROUP) * GROUP
  members = tl.minimum(GROUP, walks - first)
  place = turn - 2 * first
  follows = place >= members
  walk = first + tl.where(follows, place - members, place)
  return follows, walk, flags_ptr + 1 + walk


@triton.jit
def post(flag_ptr, count):
  """Tells that `count` results are in memory. Every warp has stored its part by then."""
  tl.debug_barrier()
  tl.atomic_xchg(flag_ptr, count, sem='release', scope='gpu')


@triton.jit
def wait(flag_ptr, count):
  """Returns once `count` results are in memory; what is loaded behind it sees them."""
  while tl.atomic_add(flag_ptr, 0, sem='acquire', scope='gpu') < count:
    pass
  tl.debug_barrier()
