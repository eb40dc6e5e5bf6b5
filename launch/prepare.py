"""Make the data of a recipe: ``python -m launch.prepare --config=configs/digits.py --workdir=DIR --stage=data``.

Each stage writes a tfds dataset under ``WORKDIR/data`` and reuses what is already there.
"""

import dataclasses
import pathlib

from absl import flags, logging

from causvid_jax.config import Recipe, require
from causvid_jax.data import moving_digits
from launch import common

_CONFIG = common.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the recipe keeps its data, weights and logs.")
_STAGE = flags.DEFINE_string("stage", None, "What to make: data.")
_COUNT = flags.DEFINE_integer("count", 0, "How many examples to make; 0 takes the number the recipe names.")


def data(recipe: Recipe, workdir: pathlib.Path, count: int) -> None:
    """Write the clips of the recipe's dataset; ``count`` replaces the number of training clips."""
    config = dataclasses.replace(recipe.data, train_clips=count or recipe.data.train_clips)
    builder = moving_digits.prepare(workdir / "data", config, recipe.video)
    for name, split in builder.info.splits.items():
        logging.info("%s: %d clips", name, split.num_examples)
    print(f"{builder.data_path}: {config.train_clips} training and {config.test_clips} test clips")


STAGES = {"data": data}


def main() -> None:
    """Check the flags, then make one stage's dataset."""
    recipe = common.load_recipe(_CONFIG)
    require(_WORKDIR.value, "no --workdir is given; it must be a directory for data and weights")
    require(_STAGE.value in STAGES, f"--stage is {_STAGE.value!r}; accepted: {', '.join(STAGES)}")
    require(_COUNT.value >= 0, f"--count is {_COUNT.value}; it must not be negative")
    STAGES[_STAGE.value](recipe, pathlib.Path(_WORKDIR.value), _COUNT.value)


if __name__ == "__main__":
    common.run(main)
