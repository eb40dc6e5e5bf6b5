"""The same as ``causvid sample``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("sample")
