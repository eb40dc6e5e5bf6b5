"""The same as ``causvid bench``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("bench")
