"""Make the data of a recipe: ``python -m launch.prepare --config=configs/digits.py --workdir=DIR --stage=data``.

Stages, in the order of the road: ``data`` writes the clips, ``latents`` encodes them with the trained VAE,
``trajectories`` runs the trained teacher's ODE. Each writes a tfds dataset under ``WORKDIR/data``, keeps what is there
already, and after an interruption goes on where it stopped. ``prompts``, of recipes with a UMT5 encoder, encodes the
captions into ``WORKDIR/prompts``, where trajectories and training find them: neither has room for the encoder.
``assets``, when all is trained, makes the weights of ``WORKDIR`` those that come with the package.
"""

import dataclasses
import pathlib

import jax
from absl import flags, logging

from causvid_jax.config import Recipe, require
from causvid_jax.data import arrays, derived, digits, encoder, moving_digits, pipeline
from causvid_jax.weights import stages
from launch import common

_CONFIG = common.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the recipe keeps its data, weights and logs.")
_STAGE = flags.DEFINE_string("stage", None, "What to make: data, latents, prompts, trajectories or assets.")
_COUNT = flags.DEFINE_integer("count", 0, "How many examples to make; 0 takes the number the recipe names.")

PROMPTS_AT_ONCE = 512
"""Rows of so many prompts are held at once (8 MB each for Wan); the encoder is read anew for each lot."""


def data(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Write the clips; ``count`` replaces the number of training clips."""
    config = dataclasses.replace(recipe.data, train_clips=count or recipe.data.train_clips)
    builder = moving_digits.prepare(workdir / "data", config, recipe.video)
    return f"{builder.data_path}: {config.train_clips} training and {config.test_clips} test clips"


def latents(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Encode the first ``count`` training clips (0: all)."""
    clips = moving_digits.source(workdir / "data", recipe.data, recipe.video, "train")
    params, config = stages.load_vae(stages.find(recipe.name, "vae", workdir), recipe.vae)
    name = moving_digits.MovingDigitsConfig.of(recipe.data, recipe.video).name
    folder = workdir / "data" / "latents"
    derived.write_latents(folder, clips, params, config, clips=name, count=count, **pipeline.this_process())
    return _summary(folder)


def prompts(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Encode the first ``count`` (0: all) training captions, and the negative prompt."""
    require(recipe.text.kind == "umt5", f"text.kind is {recipe.text.kind!r}, whose prompts need no encoding")
    reader = encoder.open_encoder(recipe, workdir)
    captions = digits.captions(recipe.data, "train")[: count or None]
    wanted = encoder.missing(reader, [recipe.text.negative, *captions])
    for start in range(0, len(wanted), PROMPTS_AT_ONCE):
        encoder.encode(reader, wanted[start : start + PROMPTS_AT_ONCE])
    return f"{workdir / 'prompts'}: {len(captions)} captions and the negative prompt, {len(wanted)} of them new"


def trajectories(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Run the teacher's ODE for ``count`` (0: as many as the init stage asks for) training captions."""
    params = stages.load_transformer(stages.find(recipe.name, "teacher", workdir), recipe.teacher, "teacher")
    captions = digits.captions(recipe.data, "train")
    chosen = derived.prompt_sequence(captions, count or recipe.train_init.trajectories, recipe.data.seed)
    folder = workdir / "data" / "trajectories"
    derived.write_trajectories(
        folder,
        params,
        recipe,
        chosen,
        seed=recipe.train_init.seed,
        prompt_encoder=encoder.open_encoder(recipe, workdir, compute=False),
        **pipeline.this_process(),
    )
    return _summary(folder)


def assets(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Publish the trained weights; ``count`` means nothing here."""
    return "\n".join(f"{path}: {path.stat().st_size / 1e6:.1f} MB" for path in stages.publish(recipe.name, workdir))


def _summary(folder: pathlib.Path) -> str:
    if not arrays.is_complete(folder):
        return f"{folder}: this process is done, others are not; run the stage once more to finish the dataset"
    return f"{folder}: {len(arrays.source(folder))} examples"


STAGES = {"data": data, "latents": latents, "prompts": prompts, "trajectories": trajectories, "assets": assets}


def main() -> None:
    """Check the flags, then make one stage's dataset."""
    recipe = common.load_recipe(_CONFIG)
    stage, workdir, count = _STAGE.value or "", _WORKDIR.value or "", _COUNT.value
    require(workdir != "", "no --workdir is given; it must be a directory for data and weights")
    require(stage in STAGES, f"--stage is {stage!r}; accepted: {', '.join(STAGES)}")
    require(count >= 0, f"--count is {count}; it must not be negative")
    folder = common.writable_workdir(workdir)
    if stage != "data":
        common.enable_compilation_cache()
        logging.info("%d process(es), %d device(s) here", jax.process_count(), jax.local_device_count())
    print(STAGES[stage](recipe, folder, count))


if __name__ == "__main__":
    common.run(main)
