"""Block sizes worth a try: what tuning times, and what the self-test checks with `--candidates`.

None is in use before its gradients were found right on the card at hand.
"""

import dataclasses
import itertools

from rla_jax.kernels.residual.gpu.blocks import Blocks, Kernel, with_chunk

PARTS = ('chunk', 'forward', 'pair', 'sweep', 'queries', 'keys', 'prepare', 'fill', 'pieces')
# The shorter list: tiles with warps and stages that have been among the fastest of their kind.
PROMISING = {
  'forward': ((64, 4, 2), (64, 4, 3), (128, 8, 2), (32, 2, 3), (16, 1, 3)),
  'pair': ((64, 4, 3), (64, 4, 2), (32, 4, 3)),
  'sweep': ((64, 4, 2), (64, 4, 3), (128, 8, 2), (32, 2, 3), (16, 1, 3)),
  **dict.fromkeys(
    ('queries', 'keys'),
    ((32, 4, 3), (16, 4, 4), (32, 4, 2), (16, 4, 3), (16, 4, 2), (64, 4, 2), (64, 8, 2)),
  ),
  'prepare': ((0, 1, 1), (0, 2, 1), (0, 4, 1)),
}


def candidates(
  current: Blocks, part: str, value_dim: int, *, thorough: bool = False
) -> list[Blocks]:
  """Records that differ from `current` in one of PARTS; `current` is the first.

  Args:
    current: where to start from.
    part: what is varied.
    value_dim: V of a head; no tile is wider than it needs.
    thorough: all launches that the compiler may take, not the promising ones alone.
  """
  change = dataclasses.replace
  widest = max(16, 1 << (value_dim - 1).bit_length())
  if part == 'chunk':
    sizes = itertools.product((16, 32, 64), (1, 2, 4)) if thorough else ((32, 2), (64, 1))
    found = [with_chunk(current, c, s) for c, s in sizes if c * s <= 128]
  elif part == 'pair' and current.pair is None:
    found = []
  elif part == 'pieces':
    found = [change(current, pieces=p) for p in (1, 2, 4, 8, 16)]
  elif part == 'fill':
    found = [change(current, fill=f) for f in (0, 1, 2, 4, 8)]
  elif part in PROMISING:
    # One stage is left out where loads are staged: Triton 3.6 has read invalid shared memory there
    # on Hopper.
    launches = PROMISING[part]
    if thorough:
      tiles = (0,) if part == 'prepare' else (16, 32, 64, 128)
      stages = (1, 2) if part == 'prepare' else (2, 3, 4)
      launches = itertools.product(tiles, (1, 2, 4, 8), stages)
    found = [change(current, **{part: Kernel(*x)}) for x in launches if x[0] <= widest]
    if part == 'pair':
      found.insert(0, change(current, pair=None, apart=False, walk=None))
  else:
    raise ValueError(f'part is {part!r}; expected one of {", ".join(PARTS)}')
  return [current, *(f for f in found if f != current)]
