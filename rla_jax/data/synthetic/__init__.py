"""Examples of synthetic tasks, drawn from a seed: recall and state tracking.

    based_train(seed), based_test(seed)        # multi-query associative recall, the Based setting
    multi_query_recall(seed, ...)              # one set of it; with keys that are assigned again
    parity(seed, ...), modular_arithmetic(seed, ...), permutations(seed, ...)

A set is `Examples`: inputs, the target at every position, and which of them count.
"""

from rla_jax.data.synthetic.examples import Examples
from rla_jax.data.synthetic.mqar import based_test, based_train, multi_query_recall
from rla_jax.data.synthetic.state_tracking import modular_arithmetic, parity, permutations

__all__ = [
  'Examples',
  'based_test',
  'based_train',
  'modular_arithmetic',
  'multi_query_recall',
  'parity',
  'permutations',
]
