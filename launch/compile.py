"""The same as ``causvid compile``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("compile")
