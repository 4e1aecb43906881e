"""Tests of `rla_jax.ops`: one list of cases for all implementations."""
