"""The recurrent state: the base state S and the residual state R of every head."""

from typing import NamedTuple

from rla_jax.shapes import State


class ResidualState(NamedTuple):
  """States of a layer, a pytree in float32 (float64 for float64 inputs); sizes in `rla_jax.shapes`.

  Stored (key, value): the prediction for a key is `base^T k`, transposed against the paper.
  Feed it back as `initial_state` to continue a sequence.

  Attributes:
    base: S [B, H, K, V].
    residual: R [B, H, K, V], or None for a base model (`gamma=None`).
  """

  base: State
  residual: State | None
