"""Data: the moving-digits dataset, generic array datasets, and the Grain input pipeline."""
