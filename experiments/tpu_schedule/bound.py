"""Arithmetic that a chunk needs, and how fast a TPU core's matrix unit could do it."""

# Multiply-accumulates of one 128 x 128 or 256 x 256 matrix unit in a cycle.
UNIT_WIDTH = {'v4': 128, 'v5e': 128, 'v5p': 128, 'v6e': 256}

# Products by operation and pass: (with a state, K x V; tile by keys, C x K; tile by values, C x V),
# each counted dense, a token of a head, in multiply-accumulates. Forming the inverses is overhead.
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


def cycles(rule: str, direction: str, generation: str, units: int, size: int, chunk: int) -> float:
  """Cycles a token and head at the full bf16 rate of all matrix units, K = V = size."""
  with_state, by_key, by_value = PRODUCTS[rule, direction]
  work = with_state * size * size + (by_key + by_value) * chunk * size
  return work / (units * UNIT_WIDTH[generation] ** 2)
