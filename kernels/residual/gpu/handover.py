"""How programs of one launch wait for each other's results, without a chance of waiting for ever."""

import triton
import triton.language as tl


@triton.jit
def place_in_line(counter_ptr):
  """Number of this program in the order in which programs start, from 0.

  One that waits only for programs of lower numbers waits for programs that run or are done: the
  order of a grid's programs is nowhere promised.
  """
  return tl.atomic_add(counter_ptr, 1)


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
