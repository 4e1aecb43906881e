"""Parts of the sweeps in `experiments/`: runs that train together, their curves, the tables."""
