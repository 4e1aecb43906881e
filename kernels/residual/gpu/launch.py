"""The one place that calls jax-triton: its version differences, silent failures and defaults.

Also the compiled kernels' disk cache. JAX's persistent compilation cache spares a second process
XLA's part, but Triton has compiled by then, because its output is part of the program that the
cache looks up. So where `jax_compilation_cache_dir` is set, what Triton makes is kept there too.
"""

import functools
import hashlib
import inspect
import json
import os
import pathlib
import tempfile

import jax
import triton
from triton.runtime.jit import JITFunction

from rla_jax.kernels.residual.gpu import interpret as interpreter

# Instructions of GPUs that programs are compiled for where none is attached; else JAX asks it.
_CAPABILITIES = {'NVIDIA A100-SXM4-80GB': 80, 'NVIDIA H100 80GB HBM3': 90, 'NVIDIA H200': 90}


def device_kind() -> str:
  """Name of the device that is traced for: of the mesh in force, else the first one attached."""
  described = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  return jax.devices()[0].device_kind if described is None else described.device_kind


def is_hopper() -> bool:
  """Whether the device that is traced for is a Hopper (sm_90), or of that class (sm_100).

  Cards of sm_120 have neither its instructions nor its shared memory.
  """
  known = _CAPABILITIES.get(device_kind())
  if known is None:
    known = 10 * float(getattr(jax.devices()[0], 'compute_capability', 0))
  return 90 <= known < 120


@functools.cache
def _triton_call():
  # Importing jax-triton empties TRITON_CACHE_DIR, for every other user of Triton in the process.
  folder = os.environ.get('TRITON_CACHE_DIR')
  import jax_triton

  if folder is None:
    os.environ.pop('TRITON_CACHE_DIR', None)
  else:
    os.environ['TRITON_CACHE_DIR'] = folder
  _keep_compiled_kernels(jax_triton.triton_lib)
  call = jax_triton.triton_call
  # out_shape became out_type in jax-triton 0.4.
  is_old = 'out_shape' in inspect.signature(call).parameters
  return call, 'out_shape' if is_old else 'out_type'


def _keep_compiled_kernels(library) -> None:
  """Puts a disk cache before jax-triton's step from Triton's first intermediate form to PTX."""
  compile_ = getattr(library, 'compile_ttir_inplace', None)
  if compile_ is None:  # a jax-triton that is built otherwise: it works, without the cache
    return

  @functools.wraps(compile_)
  def cached(ttir, backend, options, compute_capability, platform):
    folder = jax.config.jax_compilation_cache_dir
    if not folder or platform != 'cuda':
      return compile_(ttir, backend, options, compute_capability, platform)
    key = (triton.__version__, str(ttir), repr(options), compute_capability)
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    path = pathlib.Path(folder) / 'triton' / f'{name}.json'
    if path.exists():
      return library.CompilationResult(**json.loads(path.read_text()))
    result = compile_(ttir, backend, options, compute_capability, platform)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A file of its own and then a rename: processes that start together never see half of it.
    with tempfile.NamedTemporaryFile('w', dir=path.parent, delete=False) as file:
      json.dump(vars(result), file)
    os.replace(file.name, path)
    return result

  library.compile_ttir_inplace = cached


def launch(
  kernel: JITFunction,
  *inputs,
  out_shape,
  grid: tuple[int, ...],
  num_warps: int,
  num_stages: int,
  aliases: dict[int, int] | None = None,
  interpret: bool = False,
  **constexprs,
):
  """Runs a Triton kernel on `inputs` followed by fresh outputs, and returns the outputs.

  Args:
    kernel: a `triton.jit` function: parameters for inputs, then outputs, then constexprs.
    *inputs: arrays, and Python numbers for run-time scalars.
    out_shape: a ShapeDtypeStruct, or a sequence of them.
    grid: programs along up to three axes.
    num_warps: warps of a program.
    num_stages: depth of the software pipeline.
    aliases: index of an input to the index of the output that takes its buffer.
    interpret: run on the host, through Triton's interpreter.
    **constexprs: every compile-time parameter of the kernel.

  Raises:
    TypeError: arguments and parameters do not match. (jax-triton alone would take a misspelled
      argument for a compile-time parameter.)
  """
  _check(kernel, len(inputs) + len(jax.tree.leaves(out_shape)), constexprs)
  call, shape_name = (interpreter.triton_call, 'out_shape') if interpret else _triton_call()
  if not interpret and device_kind() in _CAPABILITIES:
    constexprs['compute_capability'] = _CAPABILITIES[device_kind()]
  return call(
    *inputs,
    kernel=kernel,
    grid=grid,
    name=kernel.__name__,
    num_warps=num_warps,
    num_stages=num_stages,
    enable_fp_fusion=True,  # its default flips in Triton 3.10
    input_output_aliases=aliases or {},
    **{shape_name: out_shape},
    **constexprs,
  )


def _check(kernel, arguments, constexprs):
  expected = [p.name for p in kernel.params if not p.is_constexpr]
  if len(expected) != arguments:
    raise TypeError(
      f'{kernel.__name__} got {arguments} arrays and scalars, expected {len(expected)}: {expected}'
    )
  names = {p.name for p in kernel.params if p.is_constexpr}
  if names != set(constexprs):
    raise TypeError(
      f'{kernel.__name__} got the constexprs {sorted(constexprs)}, expected {sorted(names)}'
    )
