"""Examples as arrays that hold logits only where there is a target.

A batch is tokens [B, T] and positions, targets and mask [B, N]. In training N is the most targets
of an example of the set, as the logits of a few are most of the work; in a test, of all sets of
this length, so that they share a program.
"""

from collections.abc import Sequence

import numpy as np

from rla_jax.data.synthetic import Examples

_LOGITS = 2**29  # numbers that the logits of a test batch may have, over all members

Batch = dict[str, np.ndarray]


def training_arrays(sets: Sequence[Examples], batch_size: int) -> list[Batch]:
  """The batches of every set, stacked [batches, B, ...]; the last one is filled up, masked."""
  found = []
  for examples in sets:
    count = -(-len(examples) // batch_size)
    found.append({
      name: _fill(x, count * batch_size).reshape(count, batch_size, -1)
      for name, x in _compact(examples, _targets(examples)).items()
    })
  return found


def evaluation_arrays(sets: Sequence[Examples], members: int) -> dict[str, list[Batch]]:
  """The batches of every set, by its name; sized for the logits of so many members at once."""
  most: dict[int, int] = {}
  for examples in sets:
    length = examples.tokens.shape[1]
    most[length] = max(most.get(length, 0), _targets(examples))
  found = {}
  for examples in sets:
    parts = _compact(examples, most[examples.tokens.shape[1]])
    logits = members * parts['mask'].shape[1] * examples.vocab_size
    size = max(1, min(len(examples), _LOGITS // logits))
    found[examples.name] = [
      {name: _fill(x[start : start + size], size) for name, x in parts.items()}
      for start in range(0, len(examples), size)
    ]
  return found


def shapes_of(arrays: Batch) -> tuple:
  """What a program is compiled for."""
  return tuple(x.shape for x in arrays.values())


def _targets(examples: Examples) -> int:
  """The most targets of an example."""
  return int(examples.counts.sum(axis=1).max())


def _compact(examples: Examples, size: int) -> Batch:
  """tokens [N, T]; positions, targets and mask [N, size] of the positions that have a target."""
  positions = np.argsort(~examples.counts, axis=1, kind='stable')[:, :size].astype(np.int32)
  mask = np.take_along_axis(examples.counts, positions, axis=1).astype(np.float32)
  targets = np.take_along_axis(examples.targets, positions, axis=1)
  return {'tokens': examples.tokens, 'positions': positions, 'targets': targets, 'mask': mask}


def _fill(x: np.ndarray, rows: int) -> np.ndarray:
  """Rows of zeros behind the rows of x."""
  return np.pad(x, ((0, rows - len(x)), (0, 0)))
