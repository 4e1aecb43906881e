"""Parts of `experiments/mqar_sweep.py`: runs that train together, their arrays, the table."""
