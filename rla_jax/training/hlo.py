"""Reads optimised HLO: what a compiled program communicates, and which TPU kernels it runs."""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
  'collective-permute', 'collective-broadcast',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a compiled program, on one device.

  Attributes:
    name: its name in the module.
    op: what it does, as 'all-gather'; the started half of an asynchronous pair without '-start'.
    operands: shapes of what goes in, as 'bf16[16,2048]'.
    results: shapes of what comes out.
    times: how often it runs in one call of the program: loops are counted. None: nobody knows.
    text: the line of the module.
  """

  name: str
  op: str
  operands: tuple[str, ...]
  results: tuple[str, ...]
  times: int | None
  text: str

  @property
  def op_name(self) -> str:
    """What it belongs to in the traced program."""
    found = re.search(r'op_name="([^"]*)"', self.text)
    return found[1] if found else ''

  @property
  def dims(self) -> tuple[int, ...]:
    """The dimensions along which it gathers, scatters or exchanges."""
    found = re.search(r'[ ,]dimensions=\{([\d,]*)\}', self.text)
    return tuple(int(x) for x in found[1].split(',') if x) if found else ()

  @property
  def group(self) -> int:
    """Devices that take part in a communication together; 0 where that is not said."""
    if iota := re.search(r'replica_groups=\[\d+,(\d+)\]', self.text):
      return int(iota[1])
    if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', self.text):
      return listed[1].count(',') + 1
    if axes := re.search(_MESH_AXES, self.text):
      sizes_of = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
      return math.prod(int(sizes_of[name]) for name in re.findall(r"'(\w+)'", axes[2]))
    return 0

  @property
  def bytes(self) -> int:
    """Size of the larger side of one run: what a gather makes, what a reduction takes."""
    return max(sum(map(nbytes, side)) for side in (self.operands, self.results))


def collectives(hlo: str) -> list[Instruction]:
  """Every communication of an optimised module, in the order of its text.

  The TPU compiler spreads a communication over fusions that start, advance and end it. Each holds a
  copy of the instruction, with the same channel and result, which counts once. It writes a
  reduce-scatter as the fusion of an all-reduce with the slices that each device keeps of it.

  Args:
    hlo: `compiled.as_text()`.
  """
  found = {}
  for x in instructions(hlo):
    if x.op in COLLECTIVES and x.times != 0:
      channel = re.search(r'channel_id=(\d+)', x.text)
      found.setdefault((channel[1], x.op, x.results) if channel else x.name, x)
  return list(found.values())


def kernel_calls(hlo: str) -> list[Instruction]:
  """Every call of a TPU kernel."""
  target = 'custom_call_target="tpu_custom_call"'
  return [x for x in instructions(hlo) if x.op == 'custom-call' and target in x.text]


def instructions(hlo: str) -> Iterator[Instruction]:
  """All instructions of an optimised module, those of computations that are never run too."""
  computations = dict(_computations(hlo))
  times = _times(hlo, computations)
  for computation, lines in computations.items():
    matches = [m for line in lines if (m := _LINE.match(line))]
    shapes = {m['name']: tuple(_SHAPE.findall(m['shape'])) for m in matches}
    for m in matches:
      # Operands end at the first attribute; names alone, or each behind its shape.
      names = re.findall(r'%([\w.-]+)', m['rest'].split('), ')[0])
      operands = tuple(shape for name in names for shape in shapes.get(name, ()))
      results, op = shapes[m['name']], m['op'].removesuffix('-start')
      if op != m['op'] and len(results) > len(operands) > 0:
        # The started half returns its operands, then its results, then what it waits on; that of an
        # all-reduce in older compilers its results alone.
        results = results[len(operands) : 2 * len(operands)]
      if op == 'all-reduce' and computation.startswith('all-reduce-scatter'):
        op = 'reduce-scatter'
        results = tuple(x for n in matches if n['op'] == 'dynamic-slice' for x in shapes[n['name']])
      yield Instruction(m['name'], op, operands, results, times[computation], m.string)


def nbytes(shape: str) -> int:
  """Bytes of 'bf16[16,2048]', without padding."""
  kind = shape[: shape.index('[')]
  bits = {'pred': 8, 'token': 0}.get(kind)
  if bits is None:
    bits = int(re.search(r'\d+', kind)[0])
  return math.prod(sizes(shape)) * bits // 8


def sizes(shape: str) -> tuple[int, ...]:
  """Dimensions of 'bf16[16,2048]'."""
  return tuple(int(x) for x in shape[shape.index('[') + 1 : -1].split(',') if x)


_LINE = re.compile(
  r'\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][\w-]*)\((?P<rest>.*)'
)
_SHAPE = re.compile(r'[a-z]+\d*\[[\d,]*\]')
_MESH_AXES = r'replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}'


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
  """Names of the module's computations, with their lines."""
  name, lines = None, []
  for line in hlo.splitlines():
    start = re.match(r'(?:ENTRY )?%([\w.-]+) .*\{$', line)
    if start:
      name, lines = start[1], []
    elif line.startswith('}') and name is not None:
      yield name, lines
      name = None
    elif name is not None:
      lines.append(line)


def _times(hlo: str, computations: dict[str, list[str]]) -> dict[str, int | None]:
  """How often each computation runs in one call of the program."""
  calls = {name: [] for name in computations}
  for name, lines in computations.items():
    for line in lines:
      rounds = _rounds(line, computations) if ' while(' in line else 1
      called = re.findall(r'(?:body|calls|to_apply)=%([\w.-]+)', line)
      for branches in re.findall(r'branch_computations=\{([^}]*)\}', line):
        called += re.findall(r'%([\w.-]+)', branches)
      calls[name] += [(other, rounds) for other in called]
  times = dict.fromkeys(computations, 0)

  def visit(name, count):
    known = count is not None and times[name] is not None
    times[name] = times[name] + count if known else None
    for called, rounds in calls.get(name, ()):
      visit(called, None if count is None or rounds is None else count * rounds)

  visit(re.search(r'^ENTRY %([\w.-]+)', hlo, re.MULTILINE)[1], 1)
  return times


def _rounds(line: str, computations: dict[str, list[str]]) -> int | None:
  """How often a loop runs: as the compiler notes it, or up to the constant in its condition.

  Loops of `scan` count from 0 in steps of 1.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
    return int(known[1])
  condition = '\n'.join(computations[re.search(r'condition=%([\w.-]+)', line)[1]])
  limits = re.findall(r' = s32\[\]\S* constant\((\d+)\)', condition)
  return int(limits[0]) if len(limits) == 1 and 'direction=LT' in condition else None
