"""Training under SLURM."""
