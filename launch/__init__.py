"""The programs: each module is run as ``python -m launch.NAME --config=configs/RECIPE.py``."""
