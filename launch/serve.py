"""The same as ``causvid serve``."""

from causvid_jax.cli import main

if __name__ == "__main__":
    main("serve")
