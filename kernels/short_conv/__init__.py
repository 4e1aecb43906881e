"""Short causal convolution of every channel, activation and L2 norm of the heads, in one pass."""
