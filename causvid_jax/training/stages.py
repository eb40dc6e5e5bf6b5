"""The training stages of a recipe, in order."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

from causvid_jax.checkpoints import workdir as paths
from causvid_jax.config import Recipe, StageConfig, require
from causvid_jax.sharding.placement import place
from causvid_jax.training import autoencoder, consistency, dmd, flow_matching, ode
from causvid_jax.training.run import Run, open_run

TRAINERS: dict[str, Callable[[Run, pathlib.Path | None], None]] = {
    "vae": autoencoder.train_vae,
    "taehv": autoencoder.train_taehv,
    "teacher": flow_matching.train_teacher,
    "causal": flow_matching.train_causal,
    "init": ode.train_init,
    "consistency": consistency.train_consistency,
    "distill": dmd.train_distill,
}
"""Stage to trainer: the VAE, its tiny decoder, the teacher, the causal teacher, ODE regression, consistency, DMD."""


def train(name: str, recipe: Recipe, workdir: pathlib.Path, init_from: str | os.PathLike | None = None) -> None:
    """Train the stage ``name`` of ``recipe`` to its last step, resuming a run in ``workdir``; write its weights.

    Args:
        name: one of :data:`TRAINERS`.
        recipe: the recipe.
        workdir: contains the data and weights of earlier stages, and a folder for this stage.
        init_from: weights that the trained network starts from: a file, or the working directory of another recipe,
            whose weights of the same stage are read.

    Raises:
        ConfigError: settings are for sampling only; the mesh does not divide a batch; weights or data are missing,
            unreadable or of other shapes; or another run uses the folder.
        RunError: a loss stops the run, or the disk is full.
    """
    check_trainable(recipe)
    recipe.check_stage(name)
    path = None if init_from is None else paths.resolve(init_from, name)
    if path is not None:
        paths.open_stage(recipe, name, path=path)  # refuse weights that do not fit before anything is made
    recipe = with_lora(name, recipe)
    config: StageConfig = getattr(recipe, f"train_{name}")
    rules = recipe.teacher.rules if name in ("teacher", "causal") else recipe.student.rules
    with open_run(name, recipe, config, workdir, place(recipe.parallel, rules)) as run:
        TRAINERS[name](run, path)
        run.note(f"next, with the same --config and --workdir: {next_command(name, recipe)}")


def check_trainable(recipe: Recipe) -> None:
    """Refuse settings of the networks that are for sampling only.

    Raises:
        ConfigError: one is set; the message names it.
    """
    require(
        recipe.student.kv_cache == "dtype",
        f"student.kv_cache is {recipe.student.kv_cache!r}, which is for sampling; training accepts: 'dtype'",
    )
    for role in ("teacher", "student"):
        net = getattr(recipe, role)
        require(
            net.linear == "dtype",
            f"{role}.linear is {net.linear!r}, which has no gradient and is for sampling; training accepts: 'dtype'",
        )
        backend = net.attention
        require(
            backend != "int8",
            f"{role}.attention is 'int8', which has no gradient and is for sampling; training accepts: 'auto', 'xla', "
            "'cudnn', 'splash', 'blockwise'",
        )


def with_lora(name: str, recipe: Recipe) -> Recipe:
    """Return ``recipe`` with the adapters of ``train_NAME.lora`` in the network that this stage trains.

    Raises:
        ConfigError: the stage does not train a transformer.
    """
    lora = getattr(recipe, f"train_{name}").lora
    if not lora.rank:
        return recipe
    require(name not in ("vae", "taehv"), f"train_{name}.lora.rank is {lora.rank}; only transformers have adapters")
    role = "teacher" if name in ("teacher", "causal") else "student"
    return dataclasses.replace(recipe, **{role: dataclasses.replace(getattr(recipe, role), lora=lora)})


def next_command(name: str, recipe: Recipe) -> str:
    """Return the command that usually follows the stage ``name``."""
    causal = recipe.train_init.teacher == "causal"
    return {
        "vae": "causvid prepare --stage=latents",
        "taehv": "causvid sample with --config.decoder=taehv",
        "teacher": "causvid train --stage=causal" if causal else "causvid prepare --stage=trajectories",
        "causal": "causvid prepare --stage=trajectories",
        "init": "causvid train --stage=distill",
        "consistency": "causvid train --stage=distill with --config.train_distill.init=consistency",
        "distill": "causvid sample --checkpoint=WORKDIR",
    }[name]
