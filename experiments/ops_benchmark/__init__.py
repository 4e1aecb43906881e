"""Parts of `experiments/benchmark_ops.py`: problems, timing, contenders, accuracy, figures."""
