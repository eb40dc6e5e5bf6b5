"""Draw the training curves: ``python -m launch.curves --workdir=runs/digits --output=curves.png``."""

from absl import flags

from causvid_jax.cli import common
from causvid_jax.config import require
from causvid_jax.training import curves

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the stages were trained.")
_OUTPUT = flags.DEFINE_string("output", None, "The picture, a .png file.")


def main() -> None:
    """Check the flags, then draw."""
    workdir = _WORKDIR.value or ""
    require(workdir != "", "no --workdir is given; it must be the directory of a training")
    path = common.check_output(_OUTPUT.value, (".png",))
    print(f"{path}: {', '.join(curves.draw(workdir, path))}")
