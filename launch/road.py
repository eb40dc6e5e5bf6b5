"""The same as ``causvid road``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("road")
