"""The chunked form against the float64 oracle."""

from tests.ops.suite import OperatorSuite


class TestChunked(OperatorSuite):
  implementation = 'chunked'
