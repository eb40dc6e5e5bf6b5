"""The same as ``causvid vbench``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("vbench")
