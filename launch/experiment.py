"""The same as ``causvid experiment``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("experiment")
