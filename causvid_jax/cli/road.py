"""Make all weights of a recipe from scratch: ``causvid road --config=digits --workdir=DIR``.

It runs data, VAE, latents, teacher, causal teacher, trajectories, ODE regression, distillation, tiny decoder,
classifier and report, one after the other. Finished parts are skipped. Ctrl-C and SIGTERM save a checkpoint; the same
command continues. The recipe holds every setting, so the same command on the same machine gives the same weights.
"""

import dataclasses

from causvid_jax.cli import common
from causvid_jax.cli.options import config_option, option
from causvid_jax.config import Recipe, require


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags."""

    config: Recipe = config_option()
    workdir: str | None = option(None, "Folder for data, weights, logs and the report.")
    videos: str | None = option(None, "The folder of your videos, if the recipe's data.name is 'videos'.")
    captions: str | None = option(None, "Their captions: csv, tsv, json or jsonl; none: a.txt by a.mp4.")
    samples: int = option(64, "Clips per row of the report.")
    dry_run: bool = option(False, "Only list the parts and whether they are done.")

    def __post_init__(self) -> None:
        own = self.config.data.name == "videos"
        require(not own or self.videos, "no --videos is given; the recipe trains on the folder of your videos")
        require(own or not (self.videos or self.captions), "--videos is given, but the recipe makes its own data")
        require(2 <= self.samples <= 10**6, f"--samples is {self.samples}; accepted: 2 to {10**6}")


def main(options: Options) -> None:
    """List the parts, or run those that are not done."""
    recipe, folder = options.config, common.writable_workdir(options.workdir)
    print(f"Road of recipe {recipe.name}: loading ...", flush=True)
    from causvid_jax.data import prepare
    from causvid_jax.evaluation.plan import Plan
    from causvid_jax.training import road

    plan = None if recipe.data.name == "videos" else Plan(samples=options.samples, longest_factor=100)
    settings = prepare.Options(videos=options.videos or "", captions=options.captions or "")
    legs = road.legs(recipe, folder, settings, plan)
    if options.dry_run:
        for leg in legs:
            done = leg.is_done()
            print(f"{leg.name}: {'done' if done else 'to do'}")
            if done and (note := leg.note()):
                print(note)
        return
    common.enable_compilation_cache()
    common.log_start(recipe)
    with common.parts():
        road.travel(recipe, folder, legs, lambda line: print(line, flush=True))
