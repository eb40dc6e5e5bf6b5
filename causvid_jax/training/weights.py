"""The weights and text encoders that a stage in training reads."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.checkpoints import lineage, load, lora_factors, open_checkpoint
from causvid_jax.checkpoints import workdir as paths
from causvid_jax.config import LoraConfig, Recipe, StageConfig, TransformerConfig, require, to_json
from causvid_jax.distributed import collectives
from causvid_jax.models import adapters, experts, transformer
from causvid_jax.sharding.params import init_tree
from causvid_jax.sharding.placement import Placement
from causvid_jax.text import encoder
from causvid_jax.training.run import Run
from causvid_jax.training.update import NetworkStep, Trainable, TrainState


def measured_vae(recipe: Recipe, workdir: pathlib.Path) -> tuple[Any, Recipe]:
    """Return the VAE's parameters on the host, and the recipe with its latent statistics and decoder "vae".

    The VAE is that of ``workdir``, else of the package.

    Raises:
        ConfigError: there is no trained VAE, or it does not fit the recipe.
    """
    params, config = paths.load_stage(recipe, "vae", workdir, "host")
    return params, dataclasses.replace(recipe, vae=config, decoder="vae")


def check_sink_positions(recipe: Recipe, stage: str) -> None:
    """Refuse training of ``stage`` in block-causal mode (also of scores) if positions differ from those in a stream.

    With ``causal.positions = "relative"`` a stream places the sink directly before its window. Block-causal mode uses
    the true positions of the sink, which differ if a clip is longer than sink and window.

    Raises:
        ConfigError: its clips are longer than sink and window.
    """
    config: StageConfig = getattr(recipe, f"train_{stage}")
    distill = recipe.train_distill
    if stage == "distill" and distill.rollout == "self" and "causal" not in (distill.teacher, distill.critic_mode):
        return
    causal, frames = recipe.causal, max(n or recipe.video.latent_frames for _, n, _ in config.stretches)
    frames = getattr(config, "loss_frames", 0) or frames  # the scores of a distillation read the loss window
    longest = causal.sink + causal.window
    require(
        not (causal.sink and causal.window and causal.positions == "relative" and frames > longest),
        f"stage {stage} reads clips of {frames} latent frames in block-causal mode, where the sink does not move; "
        f"with causal.positions 'relative' a stream moves the sink (causal.sink {causal.sink}) after {longest} frames: "
        f"use causal.positions=absolute, causal.sink=0 or clips of at most {longest} latent frames",
    )


def load_network(run: Run, stage: str, config: TransformerConfig, path: pathlib.Path | None = None) -> Any:
    """Return the weights of ``path``, else of ``stage``, on the mesh. Each host reads its own shards only.

    With ``config.lora`` new adapters are added.

    Raises:
        ConfigError: the weights are missing or do not fit, or the start is a teacher of two networks.
    """
    require(
        path is not None or stage != "teacher" or not run.recipe.experts.boundary,
        f"the stage {run.name} starts from the teacher, which is two experts (experts.boundary "
        f"{run.recipe.experts.boundary:g}); give the folder of one of them by --init_from",
    )
    plain = dataclasses.replace(config, lora=LoraConfig())
    path = path or paths.find(run.recipe.name, stage, run.workdir)
    if stage in experts.NAMES:
        paths.check_boundary(run.recipe, path)
    opened = open_checkpoint(path, plain)
    if run.placement.mesh is None:
        return with_new_adapters(load(opened)[0], config, run.config.seed)
    # The checksum covers the whole file, so one process reads all of it through a buffer.
    collectives.check_on_first(opened.check)
    params = load(opened, run.placement.params(transformer.spec(plain), config.rules), check=False)[0]
    places = adapters.split(run.placement.params(transformer.spec(config), config.rules))[0]
    return with_new_adapters(params, config, run.config.seed, places)


def load_teacher(run: Run, stage: str) -> Any:
    """Return the frozen teacher of ``stage`` on the mesh; two experts are a dict of two trees, sharded alike.

    Errors are those of :func:`load_network`.
    """
    if not run.recipe.experts.boundary:
        return load_network(run, stage, run.recipe.teacher)
    return {name: load_network(run, name, run.recipe.teacher) for name in experts.NAMES}


def with_new_adapters(params: Any, config: TransformerConfig, seed: int, shardings: Any = None) -> Any:
    """Return ``params`` with new adapters of ``config.lora``; the kernels stay the same arrays."""
    if not config.lora.rank:
        return params
    spec = adapters.split(transformer.spec(config))[0]
    new = jax.jit(functools.partial(init_tree, spec=spec), out_shardings=shardings)(jax.random.key(seed))
    return adapters.join(new, params)


def finish(run: Run, network: Trainable, recipe: Recipe, config: TransformerConfig) -> None:
    """Write the EMA of a finished stage as its weights, with adapters merged.

    The adapters are also written to ``WORKDIR/STAGE/lora`` in peft's layout.
    """
    described = metadata(run.name, recipe, run.workdir)
    if not config.lora.rank:
        run.finish(network.ema, described)
        return
    trained = collectives.gather_to_first(network.ema)
    if collectives.is_first():
        lora_factors.save_lora(run.folder / "lora", trained, config)
    run.finish(jax.jit(functools.partial(adapters.merged, config=config))(network.averaged), described)


def initial_state(
    run: Run,
    step: NetworkStep,
    config: TransformerConfig,
    path: pathlib.Path | None = None,
    *,
    stage: str = "teacher",
    fresh: bool = False,
) -> TrainState:
    """Return the state that ``run`` starts or resumes from, on the mesh.

    Without a checkpoint its parameters are those of ``path``, else new ones if ``fresh``, else those of ``stage``.

    Raises:
        ConfigError: the weights are missing or do not fit, or adapters would be trained on new weights.
    """
    if fresh and path is None:
        require(
            not config.lora.rank,
            f"train_{run.name}.lora.rank is {config.lora.rank}, but the stage starts from new weights, which adapters "
            "would leave random; give trained ones by --init_from, or use rank 0",
        )
        key = jax.random.key(run.config.seed)
        return run.restore(run.placement.init(lambda: step.init(transformer.init(key, config)), step.shardings))
    params = load_network(run, stage, config, path)
    return run.restore(run.placement.init(step.init, step.shardings, params))


def replicated(params: Any, placement: Placement) -> Any:
    """Return a codec's parameters replicated on every device, which is cheap because a codec is small."""
    if placement.mesh is None:
        return jax.tree.map(jnp.asarray, params)
    return placement.put(params, placement.replicated())


def open_encoder(run: Run) -> encoder.Encoder:
    """Open the text encoder of a run for cached captions only, because the stage needs the device's memory."""
    return encoder.open_encoder(run.recipe, run.workdir, compute=False)


def prompt_embeds(batch: dict[str, Any], reader: encoder.Encoder) -> np.ndarray:
    """Return the prompt embeddings ``[B, S, E]`` of a batch: those stored with the dataset, else of its captions."""
    return batch["text"] if "text" in batch else encoder.encode(reader, list(batch["caption"]))


def with_text(batch: dict[str, Any], reader: encoder.Encoder, names: Iterable[str]) -> dict[str, Any]:
    """Return the arrays ``names`` of a batch, with ``text`` from :func:`prompt_embeds`."""
    values = {**batch, "text": prompt_embeds(batch, reader)}
    return {name: values[name] for name in names}


def metadata(stage: str, recipe: Recipe, workdir: pathlib.Path | None = None) -> dict[str, str]:
    """Return the metadata of the weights of ``stage``, with the digest of the VAE of ``workdir`` whose latents it read.

    ``recipe`` holds the VAE's latent statistics. Only the first process computes the digest, because only it writes
    weights.
    """
    described = {"recipe": recipe.name, "stage": stage, "config": to_json(recipe)}
    if workdir is not None and collectives.is_first():
        described[lineage.VAE_DIGEST] = lineage.weights_digest(paths.open_stage(recipe, "vae", workdir))
    return described
