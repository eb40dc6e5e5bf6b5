"""The stages of the road: vae, taehv (optional: a fast decoder of the VAE's latents), teacher, causal (optional: a
teacher of the init stage), init (ODE regression), distill (DMD). Each function here composes one."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from causvid_jax import media as files
from causvid_jax.checkpoints import store
from causvid_jax.checkpoints import workdir as weight_files
from causvid_jax.config import Recipe, StageConfig, TransformerConfig, require, to_json
from causvid_jax.data import arrays, generate, moving_digits, pipeline
from causvid_jax.data import sources as recipe_data
from causvid_jax.distributed import collectives
from causvid_jax.models import taehv, transformer, vae
from causvid_jax.sampling import batch as samplers
from causvid_jax.sampling import stream
from causvid_jax.sharding import placement
from causvid_jax.text import encoder
from causvid_jax.training import dmd, samples, steps
from causvid_jax.training.gradients import LossFn
from causvid_jax.training.loop import Phase, Stage
from causvid_jax.training.optimizers import frozen, make_optimizer
from causvid_jax.training.state import TrainState, init_state, make_step


def make_stage(name: str, recipe: Recipe, workdir: pathlib.Path, init_from: str | os.PathLike | None = None) -> Stage:
    """The stage ``name`` of ``recipe``, reading what earlier stages left in ``workdir``.

    ``init_from`` is a file of weights that the trained network starts with instead of its usual ones, or the working
    directory of another recipe, of which it takes the weights of the same stage.

    Raises:
        ConfigError: weights that are missing, unreadable or of other shapes.
    """
    if init_from is None:
        return dataclasses.replace(STAGES[name](recipe, workdir), recipe=recipe)
    path = pathlib.Path(init_from)
    path = weight_files.stage_path(path, name) if path.is_dir() else path
    # Refused before any data is looked for.
    store.check_file(path, _trained(name, recipe), f"initial weights {path}")
    return dataclasses.replace(STAGES[name](recipe, workdir, init_from=path), recipe=recipe)


def _trained(name: str, recipe: Recipe) -> Any:
    """Shapes of the parameters that the stage ``name`` trains."""
    if name in CODECS:
        return vae.abstract(recipe.vae) if name == "vae" else taehv.abstract(recipe.taehv)
    return transformer.abstract(recipe.teacher if name in ("teacher", "causal") else recipe.student)


def _export(name: str, recipe: Recipe, params: Callable[[Any], Any]) -> Callable[[Any, pathlib.Path], None]:
    def export(state, path: pathlib.Path) -> None:
        whole = collectives.gather(params(state))
        if collectives.first():
            metadata = {"recipe": recipe.name, "stage": name, "config": to_json(recipe)}
            store.save_params(path, whole, metadata)
        collectives.sync(f"{name} written")

    return export


def _phases(config: StageConfig, make: Callable[..., Any]) -> tuple[Phase, ...]:
    """The curriculum's stretches, then the main one; each reads the data in an order of its own."""
    last = config.seed + len(config.curriculum)
    return tuple(
        Phase(
            end,
            functools.partial(make, batch_size=batch_size, frames=frames, seed=last - i),
        )
        for i, (end, frames, batch_size) in enumerate(config.stretches)
    )


def _share(place: placement.Placement, make: Callable[..., Any]) -> Callable[..., Any]:
    """``make`` reading only what this process's devices hold of every batch."""
    return lambda *, batch_size, **options: make(batch_size=batch_size, rows=place.rows(batch_size), **options)


def _load_network(
    recipe: Recipe,
    stage: str,
    workdir: pathlib.Path,
    config: TransformerConfig,
    place: placement.Placement,
    path: pathlib.Path | None = None,
) -> Any:
    """The weights that ``stage`` left, or those of ``path``, on the mesh; of many hosts each reads what it holds."""
    path = path or weight_files.find(recipe.name, stage, workdir)
    expected, what = transformer.abstract(config), f"{stage} weights {path}"
    if place.mesh is None:
        return store.load_arrays(path, expected, what)[0]
    # A whole file has one checksum, so one process reads all of it, through a buffer.
    collectives.ask_first(lambda: store.verify(path))
    return store.load_sharded(path, expected, place.params(transformer.spec(config), config.rules), what)[0]


def with_vae(recipe: Recipe, workdir: pathlib.Path) -> tuple[Any, Recipe]:
    """The trained VAE, on the host, and the recipe with its latent statistics; it also shows what a stage samples."""
    params, config = weight_files.load_vae(weight_files.find(recipe.name, "vae", workdir), recipe.vae)
    return params, dataclasses.replace(recipe, vae=config, decoder="vae")


def _on_devices(codec_params: Any, place: placement.Placement) -> Any:
    """A codec on the devices: it is small, so every one holds it whole."""
    if place.mesh is None:
        return jax.tree.map(jnp.asarray, codec_params)
    return place.put(codec_params, place.whole())


def _open_encoder(recipe: Recipe, workdir: pathlib.Path) -> encoder.Encoder:
    """What reads captions while a stage trains: never a network, whose place on the device is the stage's."""
    return encoder.open_encoder(recipe, workdir, compute=False)


def _text_rows(batch: dict[str, Any], reader: encoder.Encoder) -> np.ndarray:
    """The rows that were embedded when the dataset was made, else those of its captions."""
    return batch["text"] if "text" in batch else encoder.encode(reader, list(batch["caption"]))


# ---- vae ------------------------------------------------------------------------------------------------------------


def _require_clips(recipe: Recipe, what: str) -> None:
    require(
        recipe.data.name == "moving_digits",
        f"data.name is {recipe.data.name!r}; {what} is trained on 'moving_digits' only, published ones come through "
        "causvid_jax.cli.convert",
    )


def _clips(recipe: Recipe, workdir: pathlib.Path) -> dict[str, Any]:
    """Pixel clips to train on and to test on."""
    return {
        split: moving_digits.source(workdir / "data", recipe.data, recipe.video, split) for split in ("train", "test")
    }


def _codec_stage(
    name: str,
    recipe: Recipe,
    config: StageConfig,
    place: placement.Placement,
    sources: dict[str, Any],
    *,
    start: Callable[[jax.Array], Any],
    init_from: pathlib.Path | None,
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    ready: Callable[[dict[str, Any]], Any],
    reconstruct: Callable[[Any, Any], jax.Array],
    export: Callable[[TrainState, pathlib.Path], None],
    batches: Callable[..., Any] = pipeline.clip_batches,
) -> Stage:
    """A stage on pixel clips, whose samples are clips beside what the codec makes of them, with its PSNR.

    ``start(key)`` makes the parameters, unless ``init_from`` names a file of them; ``reconstruct(params, video)``
    passes clips through the codec and back.
    """

    def sample(state: TrainState, folder: pathlib.Path, step: int) -> dict[str, float]:
        batch = next(pipeline.clip_batches(sources["test"], batch_size=config.samples, seed=0))
        output = np.asarray(reconstruct(state.ema, batch["video"]))
        samples.show(files.to_uint8(np.concatenate([batch["video"], output], axis=3)), folder, step, recipe)
        psnr = -10 * np.log10(np.mean((output - batch["video"]) ** 2) / 4)
        return {"psnr": float(psnr)} | samples.scores(files.to_uint8(output), list(batch["caption"]), recipe)

    def init() -> TrainState:
        def state(params=None) -> TrainState:
            params = start(jax.random.key(config.seed)) if params is None else params
            return init_state(params, optimizer, config.bad_loss_window)

        given = [_on_devices(store.load_params(init_from)[0], place)] if init_from else []
        return place.init(state, place.whole(), *given)  # the batch alone is split

    return Stage(
        name=name,
        config=config,
        init=init,
        step=make_step(loss, optimizer, config, place.whole()),
        phases=_phases(config, _share(place, functools.partial(batches, sources["train"]))),
        ready=ready,
        sample=sample,
        export=export,
        context=place.current,
    )


ENCODER = ("encoder", "conv1")  # what makes latents of pixels, among the VAE's parameters


def in_a_row(x: jax.Array, clips: int) -> jax.Array:
    """Each clip of ``x [B, F, ...]``, then the next ``clips - 1`` of the batch without their first frame, in one."""
    return jnp.concatenate([x, *(jnp.roll(x, -i, axis=0)[:, 1:] for i in range(1, clips))], axis=1)


def cut_out(latents: jax.Array, video: jax.Array, key: jax.Array, length: int, factor: int):
    """``length`` latent frames from a random one on, and the frames they decode to as the start of a video.

    The first latent frame of a video gives one frame, so latent frame s, which holds frames 4s - 3 to 4s, gives 4s.
    The first is made of one frame, too, unlike all others: it is in more than every fourth cut, since what is seldom
    decoded is badly encoded.
    """
    length = min(length, latents.shape[1])
    starts = latents.shape[1] - length + 1
    start = jnp.maximum(jax.random.randint(key, (), -(starts // 3), starts), 0)
    frames = 1 + factor * (length - 1)
    return (
        jax.lax.dynamic_slice_in_dim(latents, start, length, axis=1),
        jax.lax.dynamic_slice_in_dim(video, factor * start, frames, axis=1),
    )


def vae_loss(params, batch, key, *, config, kl_weight: float, train_encoder: bool = True, clips: int = 1, cut: int = 0):
    """``mean d^2 + 0.1 mean |d| + kl_weight KL``: d the reconstruction error of a sampled latent, KL per element.

    With ``clips`` above 1 the decoder is given streams of that many clips (:func:`in_a_row`), with ``cut`` above 0 that
    many latent frames of each clip (:func:`cut_out`).

    The squared term leads: L1's optimum on frames that are mostly black is all black, and training sits there.
    """
    mean, logvar = vae.encode_moments(params, batch, config=config)
    if not train_encoder:
        mean, logvar = jax.lax.stop_gradient((mean, logvar))
    logvar = jnp.clip(logvar, -20.0, 10.0)
    key, start_key = jax.random.split(key) if cut else (key, key)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    latents, video = in_a_row(vae.normalize(latents, config), clips), in_a_row(batch, clips)
    if cut:
        latents, video = cut_out(latents, video, start_key, cut, vae.time_factor(config))
    error = vae.decode(params, latents, config=config, clamp=False) - video
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
    l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(error**2)
    loss = l2 + 0.1 * l1 + kl_weight * kl
    return loss, {"loss": loss, "l1": l1, "l2": l2, "kl": kl}


def init_vae(key, config):
    """Fresh VAE parameters with a quiet posterior: at its usual unit variance the noise would drown the first signal,
    and training would settle on latents that say nothing."""
    params = vae.init(key, config)
    params["conv1"]["bias"] = params["conv1"]["bias"].at[config.z_dim :].set(-10.0)
    return params


def latent_statistics(params, source, config, *, clips: int = 256) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean per channel and one standard deviation for all channels, over ``clips`` clips of ``source``.

    One scale for all: giving every channel unit variance would make fine detail cost as much as shape.
    """
    encode = jax.jit(functools.partial(vae.encode_moments, config=config))
    batches = pipeline.clip_batches(source, batch_size=16, seed=0)
    means = [np.asarray(encode(params, next(batches)["video"])[0]) for _ in range(max(1, clips // 16))]
    values = np.concatenate(means)
    mean = values.mean(axis=tuple(range(values.ndim - 1)), dtype=np.float64)
    std = float(np.sqrt(((values - mean) ** 2).mean(dtype=np.float64)))
    return tuple(float(m) for m in mean), (std,) * config.z_dim


def vae_stage(recipe: Recipe, workdir: pathlib.Path, init_from: pathlib.Path | None = None) -> Stage:
    """Train the VAE on pixel clips; exports it with the statistics of its latents."""
    _require_clips(recipe, "a VAE")
    config = recipe.train_vae
    optimizer = make_optimizer(config.optimizer, config.steps)
    if not config.train_encoder:
        optimizer = frozen(optimizer, ENCODER)
    place = placement.place(recipe.parallel, recipe.student.rules)
    sources = _clips(recipe, workdir)
    loss = functools.partial(
        vae_loss,
        config=recipe.vae,
        kl_weight=config.kl_weight,
        train_encoder=config.train_encoder,
        clips=config.concat_clips,
        cut=config.crop_frames,
    )
    reconstruct = place.everywhere(
        lambda params, video: vae.decode(params, vae.encode(params, video, config=recipe.vae), config=recipe.vae)
    )

    def export(state: TrainState, path: pathlib.Path) -> None:
        params = collectives.gather(state.ema)
        if collectives.first():
            with collectives.alone():
                mean, std = latent_statistics(params, sources["train"], recipe.vae)
            measured = dataclasses.replace(recipe.vae, latent_mean=mean, latent_std=std)
            metadata = {"recipe": recipe.name, "stage": "vae", "config": to_json(recipe)}
            store.save_params(path, params, metadata | weight_files.vae_metadata(measured))
        collectives.sync("vae written")

    return _codec_stage(
        "vae",
        recipe,
        config,
        place,
        sources,
        start=functools.partial(init_vae, config=recipe.vae),
        init_from=init_from,
        loss=loss,
        optimizer=optimizer,
        ready=lambda batch: place.batch(batch["video"]),
        reconstruct=reconstruct,
        export=export,
    )


# ---- taehv ----------------------------------------------------------------------------------------------------------


def taehv_loss(params, batch, key, *, config, noise: float):
    """``mean d^2 + 0.1 mean |d| + mean e^2``: d the error of decoded pixels, e that of encoded latents.

    ``batch`` has ``video [B, T, H, W, 3]`` and the VAE's own ``latents [B, F, h, w, C]`` of it; the decoder reads them
    with noise of standard deviation ``noise``.
    """
    seen = batch["latents"] + noise * jax.random.normal(key, batch["latents"].shape)
    error = taehv.decode(params, seen, config=config, clamp=False) - batch["video"]
    apart = taehv.encode(params, batch["video"], config=config) - batch["latents"]
    l1, l2, encoded = jnp.mean(jnp.abs(error)), jnp.mean(error**2), jnp.mean(apart**2)
    loss = l2 + 0.1 * l1 + encoded
    return loss, {"loss": loss, "l1": l1, "l2": l2, "encoded": encoded}


def taehv_stage(recipe: Recipe, workdir: pathlib.Path, init_from: pathlib.Path | None = None) -> Stage:
    """Train the tiny codec to show, and to make, the latents of the trained VAE, or of a student's streams."""
    _require_clips(recipe, "the tiny codec")
    vae_params, recipe = with_vae(recipe, workdir)
    dataclasses.replace(recipe, decoder="taehv")  # refused unless the two codecs' latents have one shape
    config, tiny = recipe.train_taehv, recipe.taehv
    place = placement.place(recipe.parallel, recipe.student.rules)
    sources, batches = _clips(recipe, workdir), pipeline.clip_batches
    if config.rollouts:
        batches = pipeline.stream_batches
        each = [arrays.source(generate.streams_folder(workdir, clips)) for clips, _ in config.rollouts]
        sources["train"] = pipeline.Mixture(each, [len(source) for source in each])
    vae_params = _on_devices(vae_params, place)
    split = None if place.mesh is None else placement.batch_sharding(place.mesh, place.rules)
    encode = jax.jit(functools.partial(vae.encode, config=recipe.vae), out_shardings=split)

    @place.everywhere
    def reconstruct(params, vae_params, video):
        return taehv.decode(params, vae.encode(vae_params, video, config=recipe.vae), config=tiny)

    def ready(batch: dict[str, Any]) -> dict[str, jax.Array]:
        video = place.batch(batch["video"])
        latents = place.batch(batch["latents"]) if config.rollouts else encode(vae_params, video)
        return {"video": video, "latents": latents}

    return _codec_stage(
        "taehv",
        recipe,
        config,
        place,
        sources,
        start=functools.partial(taehv.init, config=tiny),
        init_from=init_from,
        loss=functools.partial(taehv_loss, config=tiny, noise=config.noise),
        optimizer=make_optimizer(config.optimizer, config.steps),
        ready=ready,
        reconstruct=lambda params, video: reconstruct(params, vae_params, video),
        export=_export("taehv", recipe, lambda state: state.ema),
        batches=batches,
    )


# ---- teacher --------------------------------------------------------------------------------------------------------


def _latent_batches(recipe: Recipe, workdir: pathlib.Path) -> Callable[..., Any]:
    source = recipe_data.latents(recipe, workdir)
    return functools.partial(pipeline.latent_batches, source, text_length=recipe.text.length)


def _ready_latents(reader: encoder.Encoder, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    return {"latents": batch["latents"], "text": _text_rows(batch, reader)}


def _start(step: steps.Step, place: placement.Placement, *networks: Any) -> Any:
    """The state that a stage begins with."""
    return place.init(step.init, step.layout, *networks)


def teacher_stage(recipe: Recipe, workdir: pathlib.Path, init_from: pathlib.Path | None = None) -> Stage:
    """Train the bidirectional teacher by flow matching on latents."""
    vae_params, recipe = with_vae(recipe, workdir)
    config, place = recipe.train_teacher, placement.place(recipe.parallel, recipe.teacher.rules)
    step = steps.teacher_step(recipe, place)
    captions, reader = samples.prompts(recipe, workdir, config.samples), _open_encoder(recipe, workdir)
    rows, empty = encoder.encode(reader, captions), encoder.null_rows(reader)
    seeds = np.arange(len(captions), dtype=np.uint32)

    @place.everywhere
    def clips(params, vae_params):
        latents = samplers.teacher_latents(params, rows, empty, seeds, config=recipe)
        return vae.decode(vae_params, latents, config=recipe.vae)

    def init() -> TrainState:
        start = [_load_network(recipe, "teacher", workdir, recipe.teacher, place, init_from)] if init_from else []
        return _start(step, place, *start)

    def sample(state: TrainState, folder: pathlib.Path, step: int) -> dict[str, float]:
        video = files.to_uint8(np.asarray(clips(state.ema, _on_devices(vae_params, place))))
        samples.show(video, folder, step, recipe)
        return samples.scores(video, captions, recipe)

    return Stage(
        name="teacher",
        config=config,
        init=init,
        step=step.update,
        phases=_phases(config, _share(place, _latent_batches(recipe, workdir))),
        ready=lambda batch: place.batch(_ready_latents(reader, batch)),
        sample=sample,
        export=_export("teacher", recipe, lambda state: state.ema),
        context=place.current,
    )


# ---- causal ----------------------------------------------------------------------------------------------------------

LOOK_STEPS = 16
"""Steps of a causal teacher's samples: a stream without guidance, to look at."""


def causal_stage(recipe: Recipe, workdir: pathlib.Path, init_from: pathlib.Path | None = None) -> Stage:
    """Make a causal teacher of the bidirectional one, by teacher forcing on latents."""
    vae_params, recipe = with_vae(recipe, workdir)
    config, place = recipe.train_causal, placement.place(recipe.parallel, recipe.teacher.rules)
    step, reader = steps.causal_step(recipe, place), _open_encoder(recipe, workdir)
    levels = tuple(1000.0 * (1 - i / LOOK_STEPS) for i in range(LOOK_STEPS))
    look = dataclasses.replace(
        recipe, student=recipe.teacher, diffusion=dataclasses.replace(recipe.diffusion, denoising_timesteps=levels)
    )
    return Stage(
        name="causal",
        config=config,
        init=lambda: _start(step, place, _load_network(recipe, "teacher", workdir, recipe.teacher, place, init_from)),
        step=step.update,
        phases=_phases(config, _share(place, _latent_batches(recipe, workdir))),
        ready=lambda batch: place.batch(_ready_latents(reader, batch)),
        sample=_sample_student(
            look, place, vae_params, samples.prompts(recipe, workdir, config.samples), reader, lambda state: state.ema
        ),
        export=_export("causal", recipe, lambda state: state.ema),
        context=place.current,
    )


# ---- init -----------------------------------------------------------------------------------------------------------


def _sample_student(
    recipe: Recipe,
    place: placement.Placement,
    vae_params,
    captions,
    reader: encoder.Encoder,
    params_of: Callable[[Any], Any],
):
    """Streams the prompts for one trained length."""
    rows = encoder.encode(reader, captions)
    streamed = place.everywhere(lambda params: stream.generate(params, jnp.asarray(rows), config=recipe)[1])

    def sample(state, folder: pathlib.Path, step: int) -> dict[str, float]:
        video = streamed({"student": params_of(state), "vae": _on_devices(vae_params, place)})
        clips = files.to_uint8(np.asarray(video))
        samples.show(clips, folder, step, recipe)
        return samples.scores(clips, captions, recipe)

    return sample


def init_stage(recipe: Recipe, workdir: pathlib.Path, init_from: pathlib.Path | None = None) -> Stage:
    """ODE regression (paper, section 4.3): the causal student, started from the teacher's weights, learns to jump to
    the end of the teacher's trajectories."""
    vae_params, recipe = with_vae(recipe, workdir)
    config, place = recipe.train_init, placement.place(recipe.parallel, recipe.student.rules)
    step = steps.init_step(recipe, place)
    sources = (
        {0: arrays.source(recipe_data.folder(workdir, recipe_data.TRAJECTORIES))}
        if config.teacher == "bidirectional"
        else {
            frames: arrays.source(generate.causal_folder(workdir, frames))
            for frames in {0, *(frames for _, frames, _ in config.curriculum)}
        }
    )
    reader = _open_encoder(recipe, workdir)

    def init() -> TrainState:
        start = []
        if init_from or step.starts:
            start = [_load_network(recipe, "teacher", workdir, recipe.student, place, init_from)]
        return _start(step, place, *start)

    def batches(*, batch_size: int, frames: int, seed: int, rows: list[int]):
        return pipeline.trajectory_batches(
            sources[frames], batch_size=batch_size, seed=seed, text_length=recipe.text.length, rows=rows
        )

    return Stage(
        name="init",
        config=config,
        init=init,
        step=step.update,
        phases=_phases(config, _share(place, batches)),
        ready=lambda batch: place.batch(
            {"text": _text_rows(batch, reader)} | {key: batch[key] for key in step.batch if key != "text"}
        ),
        sample=_sample_student(
            recipe, place, vae_params, samples.prompts(recipe, workdir, config.samples), reader, lambda state: state.ema
        ),
        export=_export("init", recipe, lambda state: state.ema),
        context=place.current,
    )


# ---- distill --------------------------------------------------------------------------------------------------------


def distill_stage(recipe: Recipe, workdir: pathlib.Path, init_from: pathlib.Path | None = None) -> Stage:
    """DMD (paper, section 4.2): student and fake score in turns, both judged by the frozen teacher."""
    vae_params, recipe = with_vae(recipe, workdir)
    config, place = recipe.train_distill, placement.place(recipe.parallel, recipe.student.rules)
    reader = _open_encoder(recipe, workdir)
    step = steps.distill_step(recipe, place, encoder.null_rows(reader))
    teacher = _load_network(recipe, "teacher", workdir, recipe.teacher, place)

    def init() -> dmd.DistillState:
        start = "init" if config.init == "ode" else "teacher"
        student = _load_network(recipe, start, workdir, recipe.student, place, init_from)
        # A donated state must share buffers neither with the teacher nor within itself.
        return _start(
            step, place, student, jax.tree.map(jnp.copy, student if config.critic_init == "student" else teacher)
        )

    make: Callable[..., Any]
    # A rollout from the student itself needs prompts alone.
    if "latents" not in step.batch and recipe.data.prompt_file:
        source = arrays.source(recipe_data.folder(workdir, recipe_data.PROMPTS))
        make = functools.partial(pipeline.prompt_batches, source, text_length=recipe.text.length)
    else:
        make = _latent_batches(recipe, workdir)

    def batches(*, batch_size: int, frames: int, seed: int, rows: list[int]):
        # One batch for every fake-score update and one for the student, drawn together.
        parts = range(config.critic_steps + 1)
        return make(
            batch_size=batch_size * len(parts),
            seed=seed,
            rows=[part * batch_size + row for part in parts for row in rows],
        )

    def ready(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        given = {**batch, "text": _text_rows(batch, reader)}
        split = {k: given[k].reshape(config.critic_steps + 1, -1, *given[k].shape[1:]) for k in step.batch}
        return place.batch(split, step.leading)

    def params_of(state: dmd.DistillState):
        return state.student_ema

    return Stage(
        name="distill",
        config=config,
        init=init,
        step=lambda state, batch: step.update(state, teacher, batch),
        phases=_phases(config, _share(place, batches)),
        ready=ready,
        sample=_sample_student(
            recipe, place, vae_params, samples.prompts(recipe, workdir, config.samples), reader, params_of
        ),
        export=_export("distill", recipe, params_of),
        context=place.current,
    )


CODECS = ("vae", "taehv")
STAGES: dict[str, Callable[..., Stage]] = {
    "vae": vae_stage,
    "taehv": taehv_stage,
    "teacher": teacher_stage,
    "causal": causal_stage,
    "init": init_stage,
    "distill": distill_stage,
}
