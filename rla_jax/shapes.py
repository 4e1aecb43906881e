"""The one key of dimension letters: array names end in them (`q_BTGK`), annotations spell them.

  B  batch                    T  time: tokens of a sequence
  H  value heads              G  query and key heads; G divides H, head h reads h // (H // G)
  K  key size of a head       V  value size of a head
  C  tokens of a chunk        N  chunks of a sequence
  D  model width              F  feed-forward width
  S  size of the vocabulary   W  width of the short convolution
  L  layers
"""

from jaxtyping import Array, Bool, Float, Int, Shaped

Queries = Float[Array, 'B T G K']
Values = Float[Array, 'B T H V']
Gate = Float[Array, 'B T H']
LogDecay = Float[Array, 'B T H'] | Float[Array, 'B T H K']
State = Float[Array, 'B H K V']
Segments = Int[Array, 'B T']

__all__ = [
  'Array', 'Bool', 'Float', 'Gate', 'Int', 'LogDecay', 'Queries', 'Segments', 'Shaped', 'State',
  'Values',
]  # fmt: skip
