"""The same as ``causvid models``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("models")
