"""The associative-scan form against the float64 oracle."""

from tests.ops.suite import OperatorSuite


class TestAssociative(OperatorSuite):
  implementation = 'associative'
