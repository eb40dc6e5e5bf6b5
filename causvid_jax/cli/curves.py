"""Draw the training curves of a run: ``causvid curves --workdir=runs/digits --output=curves.png``."""

import dataclasses

from causvid_jax.cli import common
from causvid_jax.cli.options import option
from causvid_jax.config import require


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    workdir: str | None = option(None, "The directory of a training.")
    output: str | None = option(None, "The picture to write, a .png file.")

    def __post_init__(self) -> None:
        require(self.workdir, "no --workdir is given; it must be the directory of a training")


def main(options: Options) -> None:
    """Draw the curves of every stage of the run into one picture, and print their names."""
    path = common.check_output(options.output, (".png",))
    from causvid_jax.training import curves

    print(f"{path}: {', '.join(curves.draw(options.workdir or '', path))}")
