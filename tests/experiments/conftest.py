"""What the tests of the experiments share."""

import sys

import pytest
from absl import flags


def forget(module: str) -> None:
  """Lets another program define flags of the same names."""
  if sys.modules.pop(module, None):
    for flag in list(flags.FLAGS.flags_by_module_dict().get(module, [])):
      delattr(flags.FLAGS, flag.name)


@pytest.fixture(autouse=True)
def no_flags_left():
  """Programs whose flags have the same names can be imported one after the other."""
  yield
  for module in ('mqar_sweep', 'state_tracking_sweep', 'tune_kernels'):
    forget(module)
