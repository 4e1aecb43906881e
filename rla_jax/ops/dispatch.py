"""Which implementation serves a call: by platform, and by what each says it can do.

An implementation is a module with two or three functions,

    unsupported(inputs, options) -> reason, or None if it serves the call
    run(inputs, options) -> (o, state)
    run_step(inputs, options) -> (o, state)         one token; not all have it

and is imported when it is first considered, so that no kernel library is needed to import ours.
"""

import importlib
from collections.abc import Sequence

import jax

from rla_jax.ops.inputs import Inputs, Options

_MODULES = {
  'reference': 'rla_jax.ops.reference',
  'associative': 'rla_jax.ops.associative',
  'chunked': 'rla_jax.ops.chunked',
  'triton': 'rla_jax.ops.triton',
  'pallas': 'rla_jax.ops.pallas',
}
_PREFERRED = {
  'cpu': ('chunked',),
  'gpu': ('triton', 'chunked'),
  'cuda': ('triton', 'chunked'),
  'tpu': ('pallas', 'chunked'),
}
_PREFERRED_STEP = {
  'gpu': ('triton', 'reference'),
  'cuda': ('triton', 'reference'),
  'tpu': ('pallas', 'reference'),
}
IMPLEMENTATIONS = tuple(_MODULES)


def current_platform() -> str:
  """Platform that the call is traced for: of the mesh in force, the default device, the backend.

  The mesh comes first so that a program can be compiled for devices that are not attached.
  """
  mesh_device = getattr(jax.sharding.get_abstract_mesh(), 'abstract_device', None)
  for device in (mesh_device, jax.config.jax_default_device):
    platform = device if isinstance(device, str) else getattr(device, 'platform', None)
    if platform:
      return platform
  return jax.default_backend()


def reasons(inputs: Inputs, options: Options) -> dict[str, str | None]:
  """Why each implementation cannot serve the call; None where it can."""
  return {name: _reason(name, inputs, options) for name in IMPLEMENTATIONS}


def select(
  inputs: Inputs, options: Options, implementation: str | Sequence[str] | None = None
) -> str:
  """Name of the implementation that serves the call.

  Raises:
    ValueError: an unknown name, an empty sequence.
    NotImplementedError: none of those asked for serves the call; the message says why each does
      not and which do.
  """
  return _first(candidates(implementation), implementation, _reason, inputs, options)


def select_step(
  inputs: Inputs, options: Options, implementation: str | Sequence[str] | None = None
) -> str:
  """Name of the implementation that serves one step of decoding. Raises as `select` does."""
  names = implementation or _PREFERRED_STEP.get(current_platform(), ('reference',))
  return _first(candidates(names), implementation, _step_reason, inputs, options)


def module(name: str):
  """The module of an implementation."""
  return importlib.import_module(_MODULES[name])


def candidates(implementation: str | Sequence[str] | None) -> Sequence[str]:
  """Names in the order in which they are tried.

  Raises:
    ValueError: an unknown name, an empty sequence.
  """
  if implementation is None:
    return _PREFERRED.get(current_platform(), ('chunked',))
  names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
  unknown = [name for name in names if name not in _MODULES]
  if unknown or not names:
    raise ValueError(
      f'implementation is {implementation!r}; expected None, one of {list(IMPLEMENTATIONS)}, '
      'or a non-empty sequence of these'
    )
  return names


def _reason(name, inputs, options):
  return module(name).unsupported(inputs, options)


def _step_reason(name, inputs, options):
  if not hasattr(module(name), 'run_step'):
    return 'it has no form for a single token'
  return _reason(name, inputs, options)


def _first(names, implementation, reason_of, inputs, options):
  refused = {}
  for name in names:
    refused[name] = reason_of(name, inputs, options)
    if refused[name] is None:
      return name
  why = '; '.join(f'{name!r}: {reason}' for name, reason in refused.items())
  able = [name for name in IMPLEMENTATIONS if reason_of(name, inputs, options) is None]
  raise NotImplementedError(
    f'implementation={implementation!r} cannot serve this call ({why}). These can: {able}.'
  )
