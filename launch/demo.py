"""The same as ``causvid demo``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("demo")
