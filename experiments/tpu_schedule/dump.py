"""Reads what the TPU compiler writes about its schedule (LIBTPU_INIT_ARGS of `flags`)."""

import dataclasses
import pathlib
import re

UNITS = (
  'MXU', 'XLU', 'VALU', 'VPOP', 'EUP', 'VLOAD', 'FILL', 'VSTORE', 'SPILL', 'SALU',
)  # fmt: skip


def flags(folder: pathlib.Path) -> str:
  """Value of LIBTPU_INIT_ARGS that makes the compiler write its schedules to `folder`."""
  return (
    f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true '
    '--xla_jf_debug_level=2 --xla_jf_dump_llo_pass_label_regex=final.*'
  )


@dataclasses.dataclass(frozen=True)
class Loop:
  """The innermost loop of a kernel.

  Attributes:
    bundles: instructions of one pass, which is the cycles without waiting for memory.
    used: slots taken of each unit.
    slots: slots of each unit in a bundle.
  """

  bundles: int
  used: dict[str, int]
  slots: dict[str, int]

  def share(self, unit: str) -> float:
    """Share of a unit's slots that is in use."""
    return self.used[unit] / (self.bundles * max(self.slots[unit], 1))


def kernel_loop(folder: pathlib.Path, name: str) -> Loop:
  """The innermost loop of the kernel called `name`.

  Raises:
    FileNotFoundError: the compiler wrote no schedule of such a kernel.
  """
  # JAX wraps the name in those of its transformations: jvp_NAME_, transpose_jvp_NAME__.
  stem = rf'\d+-(\w+_)?{name}_*\.\d+-\d+-'
  schedules = _matching(folder, stem + r'final_bundles\.txt')
  usages = _matching(folder, stem + r'final_hlo-static-per-bundle-utilization\.txt')
  if not schedules or not usages:
    raise FileNotFoundError(f'no schedule of kernel {name!r} in {folder}')
  numbers = [
    [int(x) for x in line.split()]
    for line in usages[0].read_text().splitlines()
    if line.strip() and re.fullmatch(r'[\d\s]+', line)
  ]
  capacity, usage = numbers[0], numbers[1:]
  depth = {}
  for line in schedules[0].read_text(errors='replace').splitlines():
    # Address, an optional marker, one '>' for each loop around the bundle.
    found = re.match(r'\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{', line)
    if found:
      depth[int(found[1], 16)] = len(found[2])
  deepest = max(depth.values())
  inside = [i for i, d in depth.items() if d == deepest]
  used = {
    unit: sum(usage[i][u] for i in inside if i < len(usage)) for u, unit in enumerate(UNITS)
  }
  return Loop(len(inside), used, dict(zip(UNITS, capacity)))


def _matching(folder, pattern):
  return sorted(path for path in folder.iterdir() if re.fullmatch(pattern, path.name))
