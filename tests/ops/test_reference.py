"""The token-by-token form against the float64 oracle."""

from tests.ops.suite import OperatorSuite


class TestReference(OperatorSuite):
  implementation = 'reference'
