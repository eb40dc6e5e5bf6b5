"""The weights of any checkpoint of a run, as the file that a finished run leaves."""

import pathlib
from typing import Any

from causvid_jax.checkpoints import store
from causvid_jax.config import ConfigError, Recipe, from_json, require, to_json
from causvid_jax.training import checkpoint, stages

AVERAGED = {"vae": "ema", "taehv": "ema", "teacher": "ema", "causal": "ema", "init": "ema", "distill": "student_ema"}
"""Of every stage the field of its state that is exported: the running mean of what it trains."""


class _State:
    """A state of which only one field is known."""

    def __init__(self, name: str, tree: Any):
        setattr(self, name, tree)


def export_checkpoint(workdir: pathlib.Path, name: str, output: pathlib.Path, step: int | None = None) -> int:
    """Write the weights of stage ``name`` at ``step`` (None: its newest checkpoint) to ``output``; the step taken.

    The recipe is the one in the checkpoint. For ``distill`` that is the student alone: no fake score, no optimizer is
    read. The file equals what the run would have exported had it ended there.

    Raises:
        ConfigError: no such checkpoint, or a damaged one; for ``vae`` also missing data, of which it measures latents.
    """
    require(name in AVERAGED, f"--stage is {name!r}; accepted: {', '.join(AVERAGED)}")
    folder = workdir / name / "checkpoints"
    step, params, progress = checkpoint.read(folder, AVERAGED[name], step)
    if not progress.get("config"):
        raise ConfigError(f"checkpoint {step} in {folder} holds no recipe; it was made by an older version")
    recipe = from_json(progress["config"])
    if name == "vae":
        stages.vae_stage(recipe, workdir).export(_State("ema", params), output)
    else:
        store.save_params(output, params, _metadata(name, recipe, workdir))
    return step


def _metadata(name: str, recipe: Recipe, workdir: pathlib.Path) -> dict[str, str]:
    measured = stages.with_vae(recipe, workdir)[1]
    return {"recipe": recipe.name, "stage": name, "config": to_json(measured)}
