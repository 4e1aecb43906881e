"""Runs the Triton kernels on the host, over numpy arrays: for tests and debugging, without a GPU.

Interpretation is switched on for the length of a call, so kernels stay ordinary `JITFunction`s that
the same process can compile; `TRITON_INTERPRET` must not be set. No torch is needed.

Triton's interpreter keeps bfloat16 as raw uint16, rounds it by truncation and multiplies the raw
bits in `tl.dot`. Here bfloat16 is `ml_dtypes.bfloat16`, conversions round to nearest even, products
accumulate in float32, and a float32 `tl.dot` with `input_precision='tf32'` (Triton's default)
loses the bits that it loses on the card. Works with Triton 3.6 to 3.9.
"""

import contextlib
import functools
import inspect
import threading
import types
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_LAUNCH_OPTIONS = ('num_warps', 'num_stages', 'num_ctas', 'enable_fp_fusion', 'maxnreg')
_interpreter_lock = threading.Lock()  # the interpreter keeps its program id in a global


def type_name(dtype) -> str:
  """The Triton name of a numpy dtype, for example "bf16"."""
  dtype = np.dtype(dtype)
  if dtype == _BFLOAT16:
    return 'bf16'
  if dtype.kind == 'b':
    return 'i1'
  return f"{ {'f': 'fp', 'i': 'i', 'u': 'u'}[dtype.kind] }{8 * dtype.itemsize}"


def _round_to_tf32(x):
  bits = x.astype(np.float32).view(np.uint32)
  return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


_triton_numpy_dtype = interpreter._get_np_dtype


def _numpy_dtype(triton_dtype):
  if not isinstance(triton_dtype, tl.pointer_type) and triton_dtype.scalar == tl.bfloat16:
    return _BFLOAT16
  return _triton_numpy_dtype(triton_dtype)


def _bits(array):
  return np.ascontiguousarray(array).view(np.uint16) if array.dtype == _BFLOAT16 else array


def _mask(handle):
  """A mask as numpy's bool; the interpreter makes integers of a scalar one that is broadcast."""
  return handle.data.astype(bool, copy=False)


def _masked_load(builder, pointers, mask, other, *cache_policy, **more):
  del builder, cache_policy, more
  element_type = pointers.get_element_ty()
  dtype = _numpy_dtype(element_type)
  memory_dtype = np.dtype(np.uint16) if dtype == _BFLOAT16 else dtype
  padding = np.zeros(pointers.data.shape, memory_dtype) if other is None else _bits(other.data)
  loaded = interpreter._interpreter.load(pointers.data, _mask(mask), padding, memory_dtype)
  return interpreter.TensorHandle(loaded.view(dtype), element_type)


def _masked_store(builder, pointers, value, mask, *cache_policy, **more):
  del builder, cache_policy, more
  return interpreter._interpreter.store(pointers.data, _bits(value.data), _mask(mask))


def _cast(builder, source, target_type):
  del builder
  return interpreter.TensorHandle(source.data.astype(_numpy_dtype(target_type)), target_type.scalar)


def _cast_rounded(builder, source, target_type, rounding_mode):
  if rounding_mode not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
    raise NotImplementedError(f'the interpreter rounds to nearest even only, not {rounding_mode}')
  return _cast(builder, source, target_type)


def _dot(builder, a, b, accumulator, input_precision, max_num_imprecise_acc):
  del builder, max_num_imprecise_acc
  operands = [a.data, b.data]
  is_tf32 = input_precision == interpreter._ir.INPUT_PRECISION.TF32
  if is_tf32 and operands[0].dtype == np.float32:
    operands = [_round_to_tf32(x) for x in operands]
  product = np.matmul(*(x.astype(accumulator.data.dtype) for x in operands))
  return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


@functools.cache  # Triton reads the signature again at every call
def _rewritten(function):
  return interpreter.InterpretedFunction(function).rewrite()


def _call_device_function(function, *args, **kwargs):
  return _rewritten(function.fn)(*args, **kwargs)


@contextlib.contextmanager
def _interpreting():
  builder = interpreter.InterpreterBuilder
  with contextlib.ExitStack() as stack:
    stack.enter_context(_interpreter_lock)
    for target, name, value in (
      (interpreter, '_get_np_dtype', _numpy_dtype),
      (builder, 'create_masked_load', _masked_load),
      (builder, 'create_masked_store', _masked_store),
      (builder, 'cast_impl', _cast),
      (builder, 'create_fp_to_fp', _cast_rounded),
      (builder, 'create_dot', _dot),
      (JITFunction, '__call__', _call_device_function),
    ):
      stack.enter_context(mock.patch.object(target, name, value))
    # Both modules at once: Triton's own device functions see tl.core, kernels see tl.
    language = types.SimpleNamespace(__globals__={'tl': tl, 'core': tl.core})
    scope = interpreter._patch_lang(language)
    stack.callback(scope.restore)
    scope.set_attr(tl.tensor, '__index__', lambda self: int(self.handle.data.reshape(())))
    # Overflow to inf and inf - inf are silent on the card.
    stack.enter_context(np.errstate(all='ignore'))
    yield interpreter.interpreter_builder


def _argument(value):
  """An array becomes a pointer, a number a scalar of the type that the compiler would choose."""
  if isinstance(value, np.ndarray):
    if not (value.flags.c_contiguous and value.flags.writeable):
      raise ValueError('the interpreter wants contiguous, writeable arrays')
    pointer_type = tl.pointer_type(tl.str_to_ty(type_name(value.dtype), None))
    address = np.array([value.ctypes.data], dtype=np.uint64)
    return tl.tensor(interpreter.TensorHandle(address, pointer_type), pointer_type)
  if isinstance(value, float):
    handle = interpreter.TensorHandle(np.array([value], np.float32), tl.float32)
    return tl.tensor(handle, tl.float32)
  return interpreter._implicit_cvt(value)


def run(kernel: JITFunction, grid, *args, **constexprs) -> None:
  """Interprets `kernel` over `grid`; numpy arrays among `args` are read and written in place.

  Launch options (num_warps, num_stages, ...) may be passed and are ignored.

  Raises:
    TypeError: an argument is missing, misspelled or superfluous.
  """
  if not isinstance(kernel, JITFunction):
    raise TypeError(f'kernel must be a triton.jit function, got {kernel!r}; unset TRITON_INTERPRET')
  constexprs = {n: v for n, v in constexprs.items() if n not in _LAUNCH_OPTIONS}
  grid = (grid,) if isinstance(grid, int) else tuple(grid)
  bound = inspect.signature(kernel.fn).bind(*args, **constexprs)
  bound.apply_defaults()
  as_is = {p.name for p in kernel.params if p.is_constexpr}
  with _interpreting() as builder:
    body = interpreter.InterpretedFunction(kernel.fn).rewrite()
    values = {
      name: value if name in as_is or value is None else _argument(value)
      for name, value in bound.arguments.items()
    }
    builder.set_grid_dim(*grid, *(1,) * (3 - len(grid)))
    for index in np.ndindex(*builder.grid_dim):
      builder.set_grid_idx(*index)
      body(**values)


def _poison(shape, dtype):
  """Fresh output memory: NaN, or the largest integer, so that a missing write shows."""
  dtype = np.dtype(dtype)
  if dtype.kind == 'b':
    return np.ones(shape, dtype)
  return np.full(shape, np.iinfo(dtype).max if dtype.kind in 'iu' else np.nan, dtype)


def triton_call(
  *args,
  kernel,
  out_shape,
  grid,
  name='',
  num_warps=None,
  num_stages=None,
  num_ctas=1,
  enable_fp_fusion=True,
  input_output_aliases=None,
  zeroed_outputs=(),
  **metaparams,
) -> Any:
  """`jax_triton.triton_call`, interpreted on the host; works under jit and shard_map."""
  del name, num_warps, num_stages, num_ctas, enable_fp_fusion
  out_shape = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), out_shape)
  flat_shapes, tree = jax.tree.flatten(out_shape)
  is_array = [not isinstance(a, (bool, int, float, np.float32)) for a in args]
  aliases = {output: source for source, output in (input_output_aliases or {}).items()}
  zeroed = zeroed_outputs(metaparams) if callable(zeroed_outputs) else zeroed_outputs
  grid = grid(metaparams) if callable(grid) else grid

  def on_host(*arrays):
    arrays = [np.array(a, order='C') for a in arrays]  # copies: an aliased kernel writes to them
    remaining = iter(arrays)
    inputs = [next(remaining) if array else a for a, array in zip(args, is_array)]
    outputs = []
    for index, shape in enumerate(flat_shapes):
      if index in aliases:
        outputs.append(arrays[aliases[index]])
      elif index in zeroed:
        outputs.append(np.zeros(shape.shape, shape.dtype))
      else:
        outputs.append(_poison(shape.shape, shape.dtype))
    run(kernel, grid, *inputs, *outputs, **metaparams)
    return tuple(outputs)

  arrays = [a for a, array in zip(args, is_array) if array]
  return jax.tree.unflatten(tree, jax.pure_callback(on_host, tuple(flat_shapes), *arrays))
