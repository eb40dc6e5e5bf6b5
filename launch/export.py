"""The same as ``causvid export``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("export")
