"""The same as ``causvid prepare``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("prepare")
