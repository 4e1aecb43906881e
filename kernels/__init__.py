"""Device code: Triton for GPUs, Pallas for TPUs. Imported as `rla_jax.kernels`.

The folder stands at the repository's root and `rla_jax/kernels` is a link to it. It refuses another
name because PyPI has an unrelated package called `kernels`.
"""

if __name__ != 'rla_jax.kernels':
  raise ImportError(f"import this package as 'rla_jax.kernels', not as {__name__!r}")
