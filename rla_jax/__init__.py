"""Residual Linear Attention and Residual Delta Net (arXiv:2509.25223) in JAX and Flax.

`rla_jax.ops` holds the operators as pure functions, `rla_jax.layers` the Flax Linen modules,
`rla_jax.nnx` their NNX twins and `rla_jax.models` the language model. Importing this package
touches no device and needs jax, flax, jaxtyping and numpy only.
"""

__version__ = '0.1.0'
