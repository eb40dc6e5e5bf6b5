"""The same as ``causvid train``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("train")
