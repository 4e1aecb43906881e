"""Looks at Triton kernels on a machine without a GPU: runs them on the host, and compiles them.

- `run(kernel, grid, *arrays, **constexprs)` interprets a kernel over numpy arrays, in place;
- `triton_call` is `jax_triton.triton_call`, interpreted;
- `compile_kernel(kernel, arguments, constexprs, ...)` builds for a GPU architecture and reports
  registers, spills, shared memory and the PTX, from the compiler's own words.
"""

import dataclasses
import functools
import pathlib
import re
import subprocess
import tempfile
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from rla_jax.kernels.residual.gpu import blocks
from rla_jax.kernels.residual.gpu.interpret import run, triton_call, type_name

__all__ = ['Compiled', 'compile_kernel', 'run', 'small_blocks', 'triton_call', 'type_name']


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compilers say of one kernel: bytes per program, registers and spills per thread."""

  registers: int
  spill_bytes: int
  shared_bytes: int
  ptx: str
  log: str

  @property
  def uses_wgmma(self) -> bool:
    return 'wgmma.mma_async' in self.ptx


def _ptxas(ptx: str, capability: int) -> str:
  architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
  with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder) / 'kernel.ptx'
    source.write_text(ptx)
    program = nvidia.get_ptxas(capability).path
    command = [program, '-v', f'--gpu-name={architecture}', source, '-o', f'{folder}/cubin']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise RuntimeError(f'ptxas failed:\n{done.stderr}')
  return done.stderr


@functools.cache
def _compile(kernel, arguments, constexprs, capability, num_warps, num_stages, enable_fp_fusion):
  target = GPUTarget('cuda', capability, 32)
  backend = make_backend(target)
  options = backend.parse_options(
    {'num_warps': num_warps, 'num_stages': num_stages, 'enable_fp_fusion': enable_fp_fusion}
  )
  names = kernel.arg_names
  constants = dict(constexprs)
  runtime = dict(zip([n for n in names if n not in constants], arguments, strict=True))
  # jax-triton promises 16-byte alignment for every array and for no scalar.
  aligned = [['tt.divisibility', 16]]
  attributes = {(names.index(n),): aligned for n, t in runtime.items() if t.startswith('*')}
  signature = {n: runtime.get(n, 'constexpr') for n in names}
  source = ASTSource(kernel, signature, constants, attributes)
  context = ir.context()
  ir.load_dialects(context)
  backend.load_dialects(context)
  code_generation = backend.get_codegen_implementation(options)
  module = source.make_ir(target, options, code_generation, backend.get_module_map(), context)
  metadata: dict[str, Any] = {'target': target, **options.__dict__}
  stages: dict[str, Any] = {}
  backend.add_stages(stages, options, source.language)
  for stage in ('ttir', 'ttgir', 'llir', 'ptx'):
    module = stages[stage](module, metadata)
  log = _ptxas(module, capability)

  def number(pattern):
    return sum(map(int, re.findall(pattern, log)))

  return Compiled(
    registers=number(r'Used (\d+) registers'),
    spill_bytes=number(r'(\d+) bytes spill stores'),
    shared_bytes=metadata['shared'],
    ptx=module,
    log=log,
  )


def compile_kernel(
  kernel: JITFunction,
  arguments,
  constexprs,
  *,
  capability: int = 90,
  num_warps: int = 4,
  num_stages: int = 3,
  enable_fp_fusion: bool = True,
) -> Compiled:
  """Builds `kernel` for compute capability 80 or 90 the way jax-triton does, without a GPU.

  Args:
    kernel: the `@triton.jit` function.
    arguments: for each argument that is not constexpr, in order: its Triton type ("*bf16" for a
      pointer, "i32" or "fp32" for a scalar), or an array or ShapeDtypeStruct of that dtype.
    constexprs: values of all constexpr parameters by name.
  """
  type_names = tuple(a if isinstance(a, str) else '*' + type_name(a.dtype) for a in arguments)
  constants = tuple(sorted(constexprs.items()))
  return _compile(
    kernel, type_names, constants, capability, num_warps, num_stages, enable_fp_fusion
  )


def small_blocks() -> blocks.Blocks:
  """Block sizes for problems that are interpreted."""
  chosen = blocks.heuristic(
    delta=True, residual=True, key_dim=16, value_dim=16, dtype='float32', heads=2, length=32
  )
  return dataclasses.replace(chosen, chunk=16)
