"""Arithmetic and traffic that a chunk needs, and how fast a TPU core could do them.

The bound of the matrix unit counts the useful products only, dense, at the full rate of all matrix
units of a core: forming the triangular inverses, elementwise work and padding are overhead. float32
products take six bf16 passes, so their bound is six times as high. The bound of the memory counts
every byte of what a kernel reads and writes once, at the chip's bandwidth.
"""

# Multiply-accumulates of one 128 x 128 or 256 x 256 matrix unit in a cycle.
UNIT_WIDTH = {'v4': 128, 'v5e': 128, 'v5p': 128, 'v6e': 256}
# A chip's bf16 FLOP/s and bytes/s, as https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
# states them.
PEAK = {
  'v4': (275e12, 1228e9), 'v5e': (197e12, 819e9), 'v5p': (459e12, 2765e9), 'v6e': (918e12, 1640e9),
}  # fmt: skip
PASSES = {'bfloat16': 1, 'float32': 6}

# Products by operation and pass: (with a state, K x V; tile by keys, C x K; tile by values, C x V),
# each counted dense, a token of a head, in multiply-accumulates.
#   forward   K S, Q S, K^T U and their likes; K K^T, Q K^T; T y, P U, M U
#   backward  what is recomputed included
PRODUCTS = {
  ('rla', 'forward'): (5, 2, 3),
  ('rdn', 'forward'): (6, 2, 5),
  ('gla', 'forward'): (2, 1, 1),
  ('gdn', 'forward'): (3, 2, 2),
  ('rla', 'backward'): (13, 6, 7),
  ('rdn', 'backward'): (16, 6, 13),
  ('gla', 'backward'): (5, 3, 2),
  ('gdn', 'backward'): (8, 6, 5),
}


def matrix_cycles(
  rule: str, direction: str, generation: str, units: int, size: int, chunk: int, dtype: str
) -> float:
  """Cycles a token and head at the full rate of a core's matrix units, K = V = size."""
  with_state, by_key, by_value = PRODUCTS[rule, direction]
  work = with_state * size * size + (by_key + by_value) * chunk * size
  return PASSES[dtype] * work / (units * UNIT_WIDTH[generation] ** 2)


def memory_cycles(generation: str, units: int, size: float) -> float:
  """Cycles in which a core moves so many bytes, if the chip's bandwidth is its only limit."""
  flops, bandwidth = PEAK[generation]
  # Cycles a second of all cores of a chip together.
  clock = flops / (2 * units * UNIT_WIDTH[generation] ** 2)
  return size * clock / bandwidth
