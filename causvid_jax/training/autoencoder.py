"""Train the causal VAE on pixel clips, and the tiny codec TAEHV on the VAE's latents."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from causvid_jax.checkpoints import wan_vae
from causvid_jax.checkpoints import workdir as paths
from causvid_jax.config import Recipe, TAEHVConfig, VAEConfig, VAEStageConfig, require
from causvid_jax.data import pipeline, sources
from causvid_jax.distributed import collectives
from causvid_jax.evaluation import frame_metrics
from causvid_jax.media import to_uint8
from causvid_jax.models import taehv, vae
from causvid_jax.sharding import placement as sharding
from causvid_jax.training import samples, weights
from causvid_jax.training.optimizers import frozen, make_optimizer
from causvid_jax.training.run import Run
from causvid_jax.training.update import TrainState, init_state, make_train_step

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]
ENCODER = ("encoder", "conv1")
"""Top-level parameter groups of the VAE's encoder."""

# ---- updates ---------------------------------------------------------------------------------------------------------


def init_vae(key: jax.Array, config: VAEConfig) -> Any:
    """Return new VAE parameters with a posterior variance of about ``exp(-10)``.

    At unit variance the noise dominates at first, and training converges to latents without content.
    """
    params = vae.init(key, config)
    params["conv1"]["bias"] = params["conv1"]["bias"].at[config.z_dim :].set(-10.0)
    return params


def concat_clips(x: jax.Array, clips: int) -> jax.Array:
    """Return each clip of ``x [B, F, ...]`` followed by the next ``clips - 1`` clips of the batch.

    The appended clips lack their first frame: the result is ``[B, F + (clips - 1) (F - 1), ...]``.
    """
    return jnp.concatenate([x, *(jnp.roll(x, -i, axis=0)[:, 1:] for i in range(1, clips))], axis=1)


def random_crop(
    latents: jax.Array, video: jax.Array, key: jax.Array, length: int, factor: int
) -> tuple[jax.Array, jax.Array]:
    """Return ``length`` latent frames from a random start, and the pixel frames that they decode to as a whole video.

    The first latent frame of a decoded video gives one pixel frame. If the crop starts at latent frame s, which encodes
    the pixel frames 4s - 3 to 4s, that frame is 4s. Latent frame 0 of the clip encodes a single frame, unlike all
    others. It is in more than a quarter of the crops, because the VAE encodes latents badly that are rarely decoded.

    Args:
        latents: of a clip, ``[B, F, h, w, C]``.
        video: its pixels, ``[B, T, H, W, 3]``.
        key: draws the start.
        length: in latent frames; at most F are returned.
        factor: pixel frames per latent frame, 4.
    """
    length = min(length, latents.shape[1])
    starts = latents.shape[1] - length + 1
    start = jnp.maximum(jax.random.randint(key, (), -(starts // 3), starts), 0)
    frames = 1 + factor * (length - 1)
    return (
        jax.lax.dynamic_slice_in_dim(latents, start, length, axis=1),
        jax.lax.dynamic_slice_in_dim(video, factor * start, frames, axis=1),
    )


def vae_loss(
    params: Any,
    batch: jax.Array,
    key: jax.Array,
    *,
    config: VAEConfig,
    stage: VAEStageConfig,
    decoder_only: bool = False,
) -> tuple[jax.Array, Metrics]:
    """Return the loss ``mean d^2 + 0.1 mean |d| + kl_weight KL``, with the error d of a decoded sample of the latents.

    ``KL = 0.5 mean (mean^2 + var - 1 - log var)`` per latent element. The squared term dominates: with ``|d|`` alone,
    training on mostly black frames stops at the optimum "all black".

    Args:
        params: of the VAE.
        batch: pixels in [-1, 1], ``[B, T, H, W, 3]``.
        key: samples the latents and the crop.
        config: of the VAE.
        stage: ``kl_weight``, and ``concat_clips`` and ``crop_frames`` for :func:`concat_clips` and
            :func:`random_crop`.
        decoder_only: the encoder has no gradient, and nothing is cropped.

    Returns:
        The scalar loss, and the metrics ``loss``, ``l1``, ``l2`` and ``kl``.
    """
    mean, logvar = vae.encode_moments(params, batch, config=config)
    if decoder_only:
        mean, logvar = jax.lax.stop_gradient((mean, logvar))
    logvar = jnp.clip(logvar, -20.0, 10.0)
    crop_frames = 0 if decoder_only else stage.crop_frames
    key, crop_key = jax.random.split(key) if crop_frames else (key, key)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    latents, video = (concat_clips(x, stage.concat_clips) for x in (vae.normalize(latents, config), batch))
    if crop_frames:
        latents, video = random_crop(latents, video, crop_key, crop_frames, vae.time_factor(config))
    error = vae.decode(params, latents, config=config, clamp=False) - video
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
    l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    loss = l2 + 0.1 * l1 + stage.kl_weight * kl
    return loss, {"loss": loss, "l1": l1, "l2": l2, "kl": kl}


def taehv_loss(
    params: Any, batch: Batch, key: jax.Array, *, config: TAEHVConfig, noise: float
) -> tuple[jax.Array, Metrics]:
    """Return the loss ``mean d^2 + 0.1 mean |d| + mean e^2``: d the error of decoded pixels, e that of encoded latents.

    ``batch`` has ``video [B, T, H, W, 3]`` in [-1, 1] and the VAE's ``latents [B, F, h, w, C]`` of it. The decoder
    reads the latents with noise of standard deviation ``noise``. The metrics are ``loss``, ``l1``, ``l2`` and
    ``encoded`` (mean e^2).
    """
    noisy = batch["latents"] + noise * jax.random.normal(key, batch["latents"].shape)
    error = taehv.decode(params, noisy, config=config, clamp=False) - batch["video"]
    latent_error = taehv.encode(params, batch["video"], config=config) - batch["latents"]
    l1, l2, encoded = jnp.mean(jnp.abs(error)), jnp.mean(error**2), jnp.mean(latent_error**2)
    loss = l2 + 0.1 * l1 + encoded
    return loss, {"loss": loss, "l1": l1, "l2": l2, "encoded": encoded}


# ---- batches ---------------------------------------------------------------------------------------------------------


def read_batches(
    run: Run, clips: Any, reader: Callable[..., Any], *, batch_size: int, frames: int, seed: int
) -> Iterator[Batch]:
    """Read this process's rows of batches of clips of ``frames`` pixel frames."""
    rows = run.placement.example_indices(batch_size)
    return reader(clips, batch_size=batch_size, frames=frames, seed=seed, rows=rows)


def latent_statistics(params: Any, clips: Any, config: VAEConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean per channel and one standard deviation for all channels, ``C`` numbers each, over 256 clips.

    All channels have one scale, because unit variance per channel would weight fine detail as much as shape.
    """
    encode = jax.jit(functools.partial(vae.encode_moments, config=config))
    batches = pipeline.clip_batches(clips, batch_size=16, seed=0)
    means = [np.asarray(encode(params, next(batches)["video"])[0]) for _ in range(16)]
    values = np.concatenate(means)
    mean = values.mean(axis=tuple(range(values.ndim - 1)), dtype=np.float64)
    std = float(np.sqrt(((values - mean) ** 2).mean(dtype=np.float64)))
    return tuple(float(m) for m in mean), (std,) * config.z_dim


# ---- loop ------------------------------------------------------------------------------------------------------------


def train_vae(run: Run, init_from: pathlib.Path | None = None) -> None:
    """Train the VAE on pixel clips, from new weights or ``init_from``; write it with the statistics of its latents.

    If no step trains the encoder, these are the statistics of ``init_from``, so that its latents stay valid.

    Raises:
        ConfigError: the clips are not prepared, or an encoder that is not trained has no weights to start from.
    """
    recipe, config = run.recipe, run.recipe.train_vae
    require(
        config.decoder_from > 0 or init_from is not None,
        "train_vae.decoder_from is 0, and new weights would leave the encoder random; give trained ones by --init_from",
    )
    clips, test_clips = (sources.clips(recipe, run.workdir, split) for split in ("train", "test"))
    optimizer = make_optimizer(config.optimizer, config.steps)
    loss = functools.partial(vae_loss, config=recipe.vae, stage=config)
    reconstruct = run.placement.jit_replicated(
        lambda params, video: vae.decode(params, vae.encode(params, video, config=recipe.vae), config=recipe.vae)
    )
    whole_step = make_train_step(loss, optimizer, config, run.placement.replicated())
    decoder_loss = functools.partial(loss, decoder_only=True)
    decoder_step = make_train_step(decoder_loss, frozen(optimizer, ENCODER), config, run.placement.replicated())
    state = initial_state(run, optimizer, functools.partial(init_vae, config=recipe.vae), init_from)
    state = run.loop(
        state,
        lambda state, batch: (whole_step if run.step < config.decoder_from else decoder_step)(state, batch),
        functools.partial(read_batches, run, clips, pipeline.clip_batches),
        lambda batch: run.placement.batch(batch["video"]),
        lambda state: sample(run, recipe, test_clips, functools.partial(reconstruct, state.network.ema)),
    )
    params = collectives.gather_to_first(state.network.ema)
    known = None if config.decoder_from else paths.open_stage(recipe, run.name, path=init_from).config
    run.finish(params, vae_metadata(params, recipe, run.workdir, known))


def vae_metadata(params: Any, recipe: Recipe, workdir: pathlib.Path, known: VAEConfig | None = None) -> dict[str, str]:
    """Return the metadata of the VAE's weights with the statistics of its latents; empty in all but process 0.

    They are those of ``known``, or measured on the clips if it has none.

    Raises:
        ConfigError: the clips on which the statistics are measured are not prepared.
    """
    if not collectives.is_first():
        return {}
    mean, std = ((), ()) if known is None else (known.latent_mean, known.latent_std)
    if not mean:
        clips = sources.clips(recipe, workdir, "train")
        with collectives.single_process():
            mean, std = latent_statistics(params, clips, recipe.vae)
    measured = dataclasses.replace(recipe.vae, latent_mean=mean, latent_std=std)
    return weights.metadata("vae", recipe) | wan_vae.metadata(measured)


def train_taehv(run: Run, init_from: pathlib.Path | None = None) -> None:
    """Train the tiny codec to decode and encode the latents of the trained VAE, or of the student's rollouts.

    Raises:
        ConfigError: clips, rollouts or the VAE are missing, or the latents of the two codecs differ in shape.
    """
    test_clips = sources.clips(run.recipe, run.workdir, "test")
    vae_params, recipe = weights.measured_vae(run.recipe, run.workdir)
    dataclasses.replace(recipe, decoder="taehv")  # refused unless the latents of the two codecs have one shape
    config, tiny, placement = recipe.train_taehv, recipe.taehv, run.placement
    if config.rollouts:
        reader: Callable[..., Any] = pipeline.stream_batches
        rollouts = [sources.streams(run.recipe, run.workdir, clips) for clips, _ in config.rollouts]
        clips: Any = pipeline.Mixture(rollouts, [len(source) for source in rollouts])
    else:
        reader, clips = pipeline.clip_batches, sources.clips(run.recipe, run.workdir, "train")
    vae_params = weights.replicated(vae_params, placement)
    split = None if placement.mesh is None else sharding.batch_sharding(placement.mesh, placement.rules)
    encode = jax.jit(functools.partial(vae.encode, config=recipe.vae), out_shardings=split)

    @placement.jit_replicated
    def reconstruct(params: Any, vae_params: Any, video: jax.Array) -> jax.Array:
        return taehv.decode(params, vae.encode(vae_params, video, config=recipe.vae), config=tiny)

    def to_device(batch: Batch) -> Batch:
        video = placement.batch(batch["video"])
        latents = placement.batch(batch["latents"]) if config.rollouts else encode(vae_params, video)
        return {"video": video, "latents": latents}

    optimizer = make_optimizer(config.optimizer, config.steps)
    loss = functools.partial(taehv_loss, config=tiny, noise=config.noise)
    train_step = make_train_step(loss, optimizer, config, placement.replicated())
    state = initial_state(run, optimizer, functools.partial(taehv.init, config=tiny), init_from)
    state = run.loop(
        state,
        train_step,
        functools.partial(read_batches, run, clips, reader),
        to_device,
        lambda state: sample(run, recipe, test_clips, functools.partial(reconstruct, state.network.ema, vae_params)),
    )
    run.finish(state.network.ema, weights.metadata(run.name, recipe, run.workdir))


def initial_state(
    run: Run, optimizer: optax.GradientTransformation, init: Callable[[jax.Array], Any], init_from: pathlib.Path | None
) -> TrainState:
    """Return the state of the last checkpoint, else of ``init_from``, else of new weights, on every device."""

    def state(params: Any = None) -> TrainState:
        params = init(jax.random.key(run.config.seed)) if params is None else params
        return init_state(params, optimizer, run.config.bad_loss_window)

    start = []
    if init_from:
        params, _ = paths.load_stage(run.recipe, run.name, None, "host", path=init_from)
        start.append(weights.replicated(params, run.placement))
    return run.restore(run.placement.init(state, run.placement.replicated(), *start))


def sample(run: Run, recipe: Recipe, clips: Any, reconstruct: Callable[[Any], jax.Array]) -> dict[str, float]:
    """Write test clips beside their reconstructions; return PSNRs in dB and the classifier's accuracies.

    ``psnr`` is of all frames, ``psnr_first`` of the first frame, ``psnr_worst`` of the worst frame index.
    """
    batch = next(pipeline.clip_batches(clips, batch_size=run.config.samples, seed=0))
    output = np.asarray(reconstruct(batch["video"]))
    path = run.folder / "samples" / f"{run.step:06d}.mp4"
    samples.show(to_uint8(np.concatenate([batch["video"], output], axis=3)), path, recipe)
    error = frame_metrics.error_by_frame(output, batch["video"])
    errors = {"psnr": np.mean(error), "psnr_first": error[0], "psnr_worst": np.max(error)}
    psnr = {name: float(frame_metrics.psnr(value, span=2.0)) for name, value in errors.items()}
    return psnr | samples.scores(run, to_uint8(output), list(batch["caption"]), recipe)
