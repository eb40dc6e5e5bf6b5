"""The four stages of the road: vae, teacher, init (ODE regression), distill (DMD). Each function here composes one."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax import video as files
from causvid_jax.config import CausalConfig, Recipe, StageConfig, to_json
from causvid_jax.data import arrays, moving_digits, pipeline
from causvid_jax.diffusion import flow
from causvid_jax.distill import cycle, ode_regression, rollout
from causvid_jax.evaluation import samplers
from causvid_jax.models import text, transformer, vae
from causvid_jax.streaming import stream
from causvid_jax.training import samples
from causvid_jax.training.loop import Phase, Stage
from causvid_jax.training.optimizers import make_optimizer
from causvid_jax.training.state import TrainState, init_state, make_step
from causvid_jax.weights import stages as weight_files
from causvid_jax.weights import store


def make_stage(name: str, recipe: Recipe, workdir: pathlib.Path) -> Stage:
    """The stage ``name`` of ``recipe``, reading what earlier stages left in ``workdir``."""
    return STAGES[name](recipe, workdir)


def _export(name: str, recipe: Recipe, params: Callable[[Any], Any]) -> Callable[[Any, pathlib.Path], None]:
    def export(state, path: pathlib.Path) -> None:
        metadata = {"recipe": recipe.name, "stage": name, "config": to_json(recipe)}
        store.save_params(path, params(state), metadata)

    return export


def _phases(config: StageConfig, make: Callable[..., Any]) -> tuple[Phase, ...]:
    """The curriculum's stretches, then the main one; each reads the data in an order of its own."""
    stretches = (*config.curriculum, (config.steps, config.frames, config.batch_size))
    return tuple(
        Phase(
            end,
            functools.partial(make, batch_size=batch_size, frames=frames, seed=config.seed + len(stretches) - i - 1),
        )
        for i, (end, frames, batch_size) in enumerate(stretches)
    )


def _load_network(recipe: Recipe, stage: str, workdir: pathlib.Path, config) -> Any:
    path = weight_files.find(recipe.name, stage, workdir)
    return jax.tree.map(jnp.asarray, weight_files.load_transformer(path, config, stage))


def with_vae(recipe: Recipe, workdir: pathlib.Path) -> tuple[Any, Recipe]:
    """The trained VAE, and the recipe with its latent statistics filled in."""
    params, config = weight_files.load_vae(weight_files.find(recipe.name, "vae", workdir), recipe.vae)
    return jax.tree.map(jnp.asarray, params), dataclasses.replace(recipe, vae=config)


def _text_rows(batch: dict[str, Any], recipe: Recipe) -> np.ndarray:
    return text.encode_prompts(list(batch["caption"]), recipe.text)


# ---- vae ------------------------------------------------------------------------------------------------------------


def vae_loss(params, batch, key, *, config, kl_weight: float):
    """``mean d^2 + 0.1 mean |d| + kl_weight KL``: d the reconstruction error of a sampled latent, KL per element.

    The squared term leads: L1's optimum on frames that are mostly black is all black, and training sits there.
    """
    mean, logvar = vae.encode_moments(params, batch, config=config)
    logvar = jnp.clip(logvar, -20.0, 10.0)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    output = vae.decode(params, vae.normalize(latents, config), config=config, clamp=False)
    error = output - batch
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


def vae_stage(recipe: Recipe, workdir: pathlib.Path) -> Stage:
    """Train the VAE on pixel clips; exports it with the statistics of its latents."""
    config = recipe.train_vae
    optimizer = make_optimizer(config.optimizer, config.steps)
    sources = {
        split: moving_digits.source(workdir / "data", recipe.data, recipe.video, split) for split in ("train", "test")
    }
    loss = functools.partial(vae_loss, config=recipe.vae, kl_weight=config.kl_weight)
    reconstruct = jax.jit(
        lambda params, video: vae.decode(params, vae.encode(params, video, config=recipe.vae), config=recipe.vae)
    )

    def sample(state: TrainState, folder: pathlib.Path, step: int) -> dict[str, float]:
        batch = next(pipeline.clip_batches(sources["test"], batch_size=config.samples, seed=0))
        output = np.asarray(reconstruct(state.ema, batch["video"]))
        pair = np.concatenate([batch["video"], output], axis=3)
        samples.show(files.to_uint8(pair), folder, step, recipe)
        psnr = -10 * np.log10(np.mean((output - batch["video"]) ** 2) / 4)
        return {"psnr": float(psnr)} | samples.scores(files.to_uint8(output), list(batch["caption"]), recipe)

    def export(state: TrainState, path: pathlib.Path) -> None:
        mean, std = latent_statistics(state.ema, sources["train"], recipe.vae)
        measured = dataclasses.replace(recipe.vae, latent_mean=mean, latent_std=std)
        metadata = {"recipe": recipe.name, "stage": "vae", "config": to_json(recipe)}
        store.save_params(path, state.ema, metadata | weight_files.vae_metadata(measured))

    return Stage(
        name="vae",
        config=config,
        init=lambda: init_state(init_vae(jax.random.key(config.seed), recipe.vae), optimizer),
        step=make_step(loss, optimizer, ema_decay=config.optimizer.ema_decay, seed=config.seed),
        phases=_phases(config, functools.partial(pipeline.clip_batches, sources["train"], **pipeline.this_process())),
        ready=lambda batch: batch["video"],
        sample=sample,
        export=export,
    )


# ---- teacher --------------------------------------------------------------------------------------------------------


def teacher_loss(params, batch, key, *, recipe: Recipe):
    """Flow matching: ``mean (v(x_t, t) - (noise - x0))^2``, t on the shifted grid, captions dropped at random."""
    latents, rows = batch["latents"], batch["text"]
    size, frames = latents.shape[:2]
    u_key, noise_key, drop_key = jax.random.split(key, 3)
    # Stratified: one u in each of B equal cells, which lowers the variance of the loss.
    u = (jnp.arange(size) + jax.random.uniform(u_key, (size,))) / size
    sigma = jnp.broadcast_to(flow.sigma_from_u(u, recipe.diffusion.shift)[:, None], (size, frames))
    noise = jax.random.normal(noise_key, latents.shape)
    keep = jax.random.uniform(drop_key, (size, 1, 1)) >= recipe.train_teacher.caption_dropout
    x_t = flow.add_noise(latents, noise, sigma)
    velocity = transformer.bidirectional(
        params, x_t, flow.timestep_from_sigma(sigma), rows * keep, config=recipe.teacher
    )
    loss = jnp.mean((velocity - flow.velocity_from(latents, noise)) ** 2)
    return loss, {"loss": loss}


def _latent_source(workdir: pathlib.Path):
    return arrays.source(workdir / "data" / "latents")


def _ready_latents(recipe: Recipe) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda batch: {"latents": batch["latents"], "text": _text_rows(batch, recipe)}


def teacher_stage(recipe: Recipe, workdir: pathlib.Path) -> Stage:
    """Train the bidirectional teacher by flow matching on latents."""
    vae_params, recipe = with_vae(recipe, workdir)
    config = recipe.train_teacher
    optimizer = make_optimizer(config.optimizer, config.steps)
    captions = samples.prompts(recipe, config.samples)

    def sample(state: TrainState, folder: pathlib.Path, step: int) -> dict[str, float]:
        tools = samplers.make_samplers({"teacher": state.ema, "vae": vae_params, "student": None}, recipe)
        video = tools.teacher(captions, 0)
        samples.show(video, folder, step, recipe)
        return samples.scores(video, captions, recipe)

    return Stage(
        name="teacher",
        config=config,
        init=lambda: init_state(transformer.init(jax.random.key(config.seed), recipe.teacher), optimizer),
        step=make_step(
            functools.partial(teacher_loss, recipe=recipe),
            optimizer,
            ema_decay=config.optimizer.ema_decay,
            seed=config.seed,
        ),
        phases=_phases(
            config,
            functools.partial(pipeline.latent_batches, _latent_source(workdir), **pipeline.this_process()),
        ),
        ready=_ready_latents(recipe),
        sample=sample,
        export=_export("teacher", recipe, lambda state: state.ema),
    )


# ---- init -----------------------------------------------------------------------------------------------------------


def _student_velocity(recipe: Recipe):
    def velocity(params, x, timestep, rows):
        return transformer.block_causal(params, x, timestep, rows, config=recipe.student, causal=recipe.causal)

    return velocity


def _sample_student(recipe: Recipe, vae_params, captions, params_of: Callable[[Any], Any]):
    """Streams the prompts for one trained length."""

    def sample(state, folder: pathlib.Path, step: int) -> dict[str, float]:
        rows = jnp.asarray(text.encode_prompts(captions, recipe.text))
        _, video = stream.generate({"student": params_of(state), "vae": vae_params}, rows, config=recipe)
        clips = files.to_uint8(np.asarray(video))
        samples.show(clips, folder, step, recipe)
        return samples.scores(clips, captions, recipe)

    return sample


def init_stage(recipe: Recipe, workdir: pathlib.Path) -> Stage:
    """ODE regression (paper, section 4.3): the causal student, started from the teacher's weights, learns to jump to
    the end of the teacher's trajectories."""
    vae_params, recipe = with_vae(recipe, workdir)
    config = recipe.train_init
    optimizer = make_optimizer(config.optimizer, config.steps)
    sizes = recipe.causal.block_sizes(recipe.video.latent_frames)
    timesteps = flow.student_timesteps(recipe.diffusion)

    def loss(params, batch, key):
        return ode_regression.ode_regression_loss(
            _student_velocity(recipe),
            params,
            jnp.moveaxis(batch["trajectory"], 1, 0),
            batch["text"],
            key,
            timesteps=timesteps,
            block_sizes=sizes,
            include_clean=config.include_clean,
            switch_fraction=config.switch_fraction,
        )

    def init() -> TrainState:
        if recipe.student == recipe.teacher:
            return init_state(_load_network(recipe, "teacher", workdir, recipe.teacher), optimizer)
        return init_state(transformer.init(jax.random.key(config.seed), recipe.student), optimizer)

    source = arrays.source(workdir / "data" / "trajectories")

    def batches(*, batch_size: int, frames: int, seed: int):
        return pipeline.trajectory_batches(source, batch_size=batch_size, seed=seed, **pipeline.this_process())

    return Stage(
        name="init",
        config=config,
        init=init,
        step=make_step(loss, optimizer, ema_decay=config.optimizer.ema_decay, seed=config.seed),
        phases=_phases(config, batches),
        ready=lambda batch: {"trajectory": batch["trajectory"], "text": _text_rows(batch, recipe)},
        sample=_sample_student(recipe, vae_params, samples.prompts(recipe, config.samples), lambda state: state.ema),
        export=_export("init", recipe, lambda state: state.ema),
    )


# ---- distill --------------------------------------------------------------------------------------------------------


def _foreign_past(key: jax.Array, latents: jax.Array, causal: CausalConfig) -> jax.Array:
    """For each clip of a batch a stretch, whole blocks, of the next clip's latents: as much as a window shows."""
    k, frames = causal.frames_per_block, causal.past_frames()
    start = k * jax.random.randint(key, (), 0, (latents.shape[1] - frames) // k + 1)
    return jax.lax.dynamic_slice_in_dim(jnp.roll(latents, -1, axis=0), start, frames, axis=1)


def student_rollout(recipe: Recipe) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array | None]]:
    """The rollout that ``train_distill.rollout`` names, as the DMD cycle takes it."""
    config, student, causal = recipe.train_distill, recipe.student, recipe.causal
    timesteps = flow.student_timesteps(recipe.diffusion)
    frames = recipe.video.latent_frames
    height, width = stream.latent_size(recipe)

    def from_data(params, batch, key):
        x0, timestep = rollout.data_rollout(
            _student_velocity(recipe),
            params,
            batch["latents"],
            batch["text"],
            key,
            timesteps=timesteps,
            block_sizes=causal.block_sizes(frames),
            include_clean=config.include_clean,
        )
        return x0, (timestep > 0).astype(jnp.float32) if config.include_clean else None

    functions = rollout.StudentFunctions(
        init_cache=lambda batch: transformer.init_cache(
            student, causal, batch=batch, height=height, width=width, frames=frames
        ),
        cached=functools.partial(transformer.cached, config=student, causal=causal),
        advance=transformer.advance,
        encode_text=functools.partial(transformer.encode_text, config=student),
    )

    def from_self(params, batch, key):
        shape = (len(batch["text"]), frames, height, width, recipe.vae.z_dim)
        roll = functools.partial(
            rollout.self_rollout, functions, params, batch["text"], shape=shape, timesteps=timesteps, causal=causal
        )
        if not config.switch_fraction:
            return roll(key), None
        key, switch_key, past_key = jax.random.split(key, 3)
        switched = jax.random.uniform(switch_key) < config.switch_fraction
        past = _foreign_past(past_key, batch["latents"], causal)
        # The teacher knows clips that begin with the VAE's first latent frame, which holds one pixel frame; in the
        # middle of a stream there is none, so the frame in its place is not judged.
        mask = jnp.ones(shape[:2]).at[:, 0].set(1.0 - switched)
        return roll(key, past=past, past_shown=switched), mask

    return from_data if config.rollout == "data" else from_self


def distill_stage(recipe: Recipe, workdir: pathlib.Path) -> Stage:
    """DMD (paper, section 4.2): student and fake score in turns, both judged by the frozen teacher."""
    vae_params, recipe = with_vae(recipe, workdir)
    config = recipe.train_distill
    optimizers = {
        "student_optimizer": make_optimizer(config.optimizer, config.steps),
        "fake_optimizer": make_optimizer(config.critic_optimizer, config.steps * config.critic_updates),
    }
    teacher = _load_network(recipe, "teacher", workdir, recipe.teacher)
    null_text = jnp.asarray(text.encode_prompts([""], recipe.text)[0])

    def bidirectional(params, x, timestep, rows):
        return transformer.bidirectional(params, x, timestep, rows, config=recipe.teacher)

    def causal_teacher(params, x, timestep, rows):
        return transformer.block_causal(params, x, timestep, rows, config=recipe.teacher, causal=recipe.causal)

    functions = cycle.DistillFunctions(
        rollout=student_rollout(recipe),
        teacher=causal_teacher if config.teacher == "causal" else bidirectional,
        fake=bidirectional,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, teacher, batches):
        return cycle.dmd_cycle(
            state,
            teacher,
            batches,
            null_text,
            jax.random.key(config.seed),
            functions=functions,
            diffusion=recipe.diffusion,
            distill=config,
            **optimizers,
        )

    def init() -> cycle.DistillState:
        start = "init" if config.init == "ode" else "teacher"
        student = _load_network(recipe, start, workdir, recipe.student)
        return cycle.init_state(student, jax.tree.map(jnp.copy, teacher), **optimizers)

    def batches(*, batch_size: int, frames: int, seed: int):
        # One batch for every fake-score update and one for the student, drawn together.
        return pipeline.latent_batches(
            _latent_source(workdir),
            batch_size=batch_size * (config.critic_updates + 1),
            seed=seed,
            **pipeline.this_process(),
        )

    def ready(batch: dict[str, Any]) -> dict[str, np.ndarray]:
        arrays_ = _ready_latents(recipe)(batch)
        if config.rollout == "self" and not config.switch_fraction:
            del arrays_["latents"]
        return {k: v.reshape(config.critic_updates + 1, -1, *v.shape[1:]) for k, v in arrays_.items()}

    def params_of(state: cycle.DistillState):
        return state.student_ema

    return Stage(
        name="distill",
        config=config,
        init=init,
        step=lambda state, batch: update(state, teacher, batch),
        phases=_phases(config, batches),
        ready=ready,
        sample=_sample_student(recipe, vae_params, samples.prompts(recipe, config.samples), params_of),
        export=_export("distill", recipe, params_of),
    )


STAGES: dict[str, Callable[[Recipe, pathlib.Path], Stage]] = {
    "vae": vae_stage,
    "teacher": teacher_stage,
    "init": init_stage,
    "distill": distill_stage,
}
