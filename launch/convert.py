"""The same as ``causvid convert``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("convert")
