"""Write the weights of any checkpoint of a run in the form of a finished run."""

import json
import pathlib

from causvid_jax.checkpoints import store
from causvid_jax.config import STAGES, ConfigError, from_json, require
from causvid_jax.models import adapters
from causvid_jax.training import autoencoder, checkpoint, provenance, weights


def export_checkpoint(workdir: pathlib.Path, name: str, output: pathlib.Path, step: int | None = None) -> int:
    """Write the EMA of stage ``name`` at ``step`` (None: its newest checkpoint) to ``output``; return the step.

    The recipe is that in the checkpoint. The file equals that of a run which ends at this step. Optimizer state and
    fake score are not read.

    Raises:
        ConfigError: there is no such checkpoint, or it is damaged; for ``vae`` also if there are no clips on which the
            statistics of latents are measured, or if its encoder is not trained.
    """
    require(name in STAGES, f"--stage is {name!r}; accepted: {', '.join(STAGES)}")
    folder, network = workdir / name / "checkpoints", "student" if name == "distill" else "network"
    step, params, progress = checkpoint.read(folder, f"{network}.ema", step)
    if not progress.get("config"):
        raise ConfigError(f"checkpoint {step} in {folder} holds no recipe")
    recipe = from_json(progress["config"])
    config = recipe.teacher if name in ("teacher", "causal") else recipe.student
    if name not in ("vae", "taehv") and config.lora.rank:
        _, frozen, _ = checkpoint.read(folder, f"{network}.params", step)
        params = adapters.merged(adapters.join(params, adapters.split(frozen)[1]), config)
    if name == "vae":
        require(
            recipe.train_vae.decoder_from > 0,
            f"{folder} is of a VAE whose encoder is not trained (train_vae.decoder_from); only the finished run has "
            "the statistics of its latents, which are those of its --init_from",
        )
        metadata = autoencoder.vae_metadata(params, recipe, workdir)
    else:
        metadata = weights.metadata(name, weights.measured_vae(recipe, workdir)[1], workdir)
    if provenance.KEY in progress:
        metadata |= {provenance.KEY: json.dumps(progress[provenance.KEY])}
    store.save_params(output, params, metadata)
    return step
