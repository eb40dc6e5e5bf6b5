"""Programs: ``causvid NAME`` or, from a clone, ``python -m launch.NAME``."""

import importlib
import sys

PROGRAMS = ("sample", "train", "prepare", "evaluate", "convert", "export", "bench", "compile", "curves", "demo")


def main(name: str | None = None) -> None:
    """Run the program ``name``; without a name, the one that the first argument names."""
    from causvid_jax.cli import common

    if name is None:
        name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in PROGRAMS:
        print(f"error: the program is {name!r}; accepted: {', '.join(PROGRAMS)}", file=sys.stderr)
        sys.exit(common.BAD_INPUT)
    common.run(importlib.import_module(f"causvid_jax.cli.{name}").main)
