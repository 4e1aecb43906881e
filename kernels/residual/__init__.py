"""Residual linear attention and the residual delta rule: both states in one fused pass."""
