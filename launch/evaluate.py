"""The same as ``causvid evaluate``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("evaluate")
