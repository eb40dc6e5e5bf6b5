"""The same as ``causvid curves``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("curves")
