"""What one training step of each transformer stage computes: jitted functions of arrays, made from a recipe alone.

Nothing here reads a file, so the same step is trained (``training.stages``) and compiled ahead of time for machines
that are not at hand (``analysis.compile_report``).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import Recipe
from causvid_jax.diffusion import flow
from causvid_jax.distill import ode_regression, rollout
from causvid_jax.models import transformer
from causvid_jax.sharding.placement import Placement
from causvid_jax.training import dmd, guard
from causvid_jax.training.optimizers import make_optimizer
from causvid_jax.training.state import TrainState, init_state, make_step, state_shardings


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage's training step.

    Attributes:
      starts: parameter specs of the networks that ``init`` begins with; none: it draws fresh parameters.
      init: ``(*starts) -> state``, traceable.
      frozen: parameter specs of networks that are read and never changed.
      update: jitted, donating the state: ``(state, *frozen, batch) -> (state, metrics)``.
      layout: where the state lies on the mesh; None without one.
      batch: shape and type of every array of a batch of ``B`` examples.
      leading: axes of a batch's arrays before B.
    """

    starts: tuple[Any, ...]
    init: Callable[..., Any]
    frozen: tuple[Any, ...]
    update: Callable[..., tuple[Any, dict[str, jax.Array]]]
    layout: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    leading: int = 0


def _arrays(recipe: Recipe, size: int, **shapes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    shapes["text"] = (recipe.text.length, recipe.text.dim)
    return {name: jax.ShapeDtypeStruct((size, *shape), np.float32) for name, shape in shapes.items()}


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


def teacher_step(recipe: Recipe, place: Placement) -> Step:
    """Flow matching of the bidirectional teacher on latents."""
    config, spec = recipe.train_teacher, transformer.spec(recipe.teacher)
    optimizer = make_optimizer(config.optimizer, config.steps)
    layout = state_shardings(place, spec, recipe.teacher.rules, optimizer)

    def init(*start) -> TrainState:
        params = start[0] if start else transformer.init(jax.random.key(config.seed), recipe.teacher)
        return init_state(params, optimizer, config.bad_loss_window)

    return Step(
        starts=(),
        init=init,
        frozen=(),
        update=make_step(
            functools.partial(teacher_loss, recipe=recipe),
            place.hosted(optimizer, spec, recipe.teacher.rules),
            config,
            layout,
        ),
        layout=layout,
        batch=_arrays(recipe, config.batch_size, latents=recipe.latent_shape),
    )


# ---- causal ----------------------------------------------------------------------------------------------------------


def causal_loss(params, batch, key, *, recipe: Recipe):
    """Teacher forcing: flow matching of every block at a timestep of its own, given the clean blocks before it."""
    config, latents, rows = recipe.train_causal, batch["latents"], batch["text"]
    size, frames = latents.shape[:2]
    blocks = recipe.causal.block_sizes(frames)
    u_key, noise_key, drop_key, splice_key = jax.random.split(key, 4)
    sigma = flow.sigma_from_u(jax.random.uniform(u_key, (size, len(blocks))), recipe.diffusion.shift)
    sigma = jnp.repeat(sigma, np.asarray(blocks), axis=1, total_repeat_length=frames)
    noise = jax.random.normal(noise_key, latents.shape)
    keep = jax.random.uniform(drop_key, (size, 1, 1)) >= config.caption_dropout
    past = ode_regression.splice(splice_key, size, blocks, config.prompt_switch_prob)
    clean = jnp.where(past[:, :, None, None, None], jnp.roll(latents, -1, axis=0), latents)
    x_t = flow.add_noise(latents, noise, sigma)
    velocity = transformer.block_causal(
        params,
        x_t,
        flow.timestep_from_sigma(sigma),
        rows * keep,
        config=recipe.teacher,
        causal=recipe.causal,
        clean=clean,
        clean_timestep=recipe.causal.context_noise,
    )
    loss = jnp.mean((velocity - flow.velocity_from(latents, noise)) ** 2)
    return loss, {"loss": loss}


def causal_step(recipe: Recipe, place: Placement) -> Step:
    """Teacher forcing of the causal teacher, which starts from the bidirectional one."""
    config, spec = recipe.train_causal, transformer.spec(recipe.teacher)
    optimizer = make_optimizer(config.optimizer, config.steps)
    layout = state_shardings(place, spec, recipe.teacher.rules, optimizer)
    return Step(
        starts=(spec,),
        init=lambda params: init_state(params, optimizer, config.bad_loss_window),
        frozen=(),
        update=make_step(
            functools.partial(causal_loss, recipe=recipe),
            place.hosted(optimizer, spec, recipe.teacher.rules),
            config,
            layout,
        ),
        layout=layout,
        batch=_arrays(recipe, config.batch_size, latents=recipe.latent_shape),
    )


# ---- init -----------------------------------------------------------------------------------------------------------


def student_velocity(recipe: Recipe):
    """The student's block-causal reading, ``(params, x, timestep, text, clean=None) -> velocity``."""

    def velocity(params, x, timestep, rows, clean=None):
        return transformer.block_causal(
            params,
            x,
            timestep,
            rows,
            config=recipe.student,
            causal=recipe.causal,
            clean=clean,
            clean_timestep=recipe.causal.context_noise,
        )

    return velocity


def init_step(recipe: Recipe, place: Placement) -> Step:
    """ODE regression (paper, section 4.3) of the causal student, which starts from the teacher's weights if it is of
    the teacher's size."""
    config, spec = recipe.train_init, transformer.spec(recipe.student)
    optimizer = make_optimizer(config.optimizer, config.steps)
    layout = state_shardings(place, spec, recipe.student.rules, optimizer)
    timesteps = flow.student_timesteps(recipe.diffusion)

    def loss(params, batch, key):
        return ode_regression.ode_regression_loss(
            student_velocity(recipe),
            params,
            jnp.moveaxis(batch["trajectory"], 1, 0),
            batch["text"],
            key,
            timesteps=timesteps,
            block_sizes=recipe.causal.block_sizes(batch["trajectory"].shape[2]),
            include_clean=config.include_clean,
            prompt_switch_prob=config.prompt_switch_prob,
            context=batch.get("context"),
        )

    def init(*start) -> TrainState:
        params = start[0] if start else transformer.init(jax.random.key(config.seed), recipe.student)
        return init_state(params, optimizer, config.bad_loss_window)

    shapes: dict[str, tuple[int, ...]] = {"trajectory": (len(timesteps) + 1, *recipe.latent_shape)}
    if config.teacher == "causal":
        shapes["context"] = recipe.latent_shape
    return Step(
        starts=(spec,) if recipe.student == recipe.teacher else (),
        init=init,
        frozen=(),
        update=make_step(loss, place.hosted(optimizer, spec, recipe.student.rules), config, layout),
        layout=layout,
        batch=_arrays(recipe, config.batch_size, **shapes),
    )


# ---- distill --------------------------------------------------------------------------------------------------------


def student_rollout(recipe: Recipe) -> Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array | None]]:
    """The rollout that ``train_distill.rollout`` names, as the DMD cycle takes it."""
    config, student, causal = recipe.train_distill, recipe.student, recipe.causal
    timesteps = flow.student_timesteps(recipe.diffusion)
    frames, height, width, _ = recipe.latent_shape

    def from_data(params, batch, key):
        x0, timestep = rollout.data_rollout(
            student_velocity(recipe),
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
        overwritten=functools.partial(transformer.overwritten, causal=causal),
        undo=functools.partial(transformer.undo, causal=causal),
        encode_text=functools.partial(transformer.encode_text, config=student),
    )

    def from_self(params, batch, key):
        shape = (len(batch["text"]), frames, height, width, recipe.vae.z_dim)
        roll = functools.partial(
            rollout.self_rollout, functions, params, batch["text"], shape=shape, timesteps=timesteps, causal=causal
        )
        if "past" not in batch:
            return roll(key), None
        shown = batch["past_shown"][0]
        # The teacher knows clips that begin with the VAE's first latent frame, which holds one pixel frame; in the
        # middle of a stream there is none, so the frame in its place is not judged.
        return roll(key, past=batch["past"], past_shown=shown), jnp.ones(shape[:2]).at[:, 0].set(1.0 - shown)

    return from_data if config.rollout == "data" else from_self


def _distill_layout(recipe, place: Placement, student_optimizer, fake_optimizer) -> dmd.DistillState | None:
    """Where a :class:`cycle.DistillState` lies; None without a mesh."""
    if place.mesh is None:
        return None
    specs = transformer.spec(recipe.student), transformer.spec(recipe.fake_score)
    student, fake = place.params(specs[0], recipe.student.rules), place.params(specs[1], recipe.fake_score.rules)
    return dmd.DistillState(
        student=student,
        fake=fake,
        student_ema=student,
        student_opt=place.optimizer(student_optimizer, specs[0], student),
        fake_opt=place.optimizer(fake_optimizer, specs[1], fake),
        step=cast(Any, place.whole()),
        watch=guard.Watch(recent=cast(Any, place.whole()), skipped=cast(Any, place.whole())),
    )


def distill_step(recipe: Recipe, place: Placement, null_text: Any) -> Step:
    """DMD (paper, section 4.2): one cycle of fake-score updates and a student update, judged by the frozen teacher.

    ``null_text [S, E]`` are the rows of the empty prompt.
    """
    config = recipe.train_distill
    optimizers = {
        "student_optimizer": make_optimizer(config.optimizer, config.steps),
        "fake_optimizer": make_optimizer(config.critic_optimizer, config.steps * config.critic_steps),
    }
    layout = _distill_layout(recipe, place, **optimizers)
    nets = {"student_optimizer": recipe.student, "fake_optimizer": recipe.fake_score}
    hosted = {name: place.hosted(o, transformer.spec(nets[name]), nets[name].rules) for name, o in optimizers.items()}

    def bidirectional(params, x, timestep, rows, net=recipe.teacher):
        return transformer.bidirectional(params, x, timestep, rows, config=net)

    def causal_teacher(params, x, timestep, rows):
        return transformer.block_causal(params, x, timestep, rows, config=recipe.teacher, causal=recipe.causal)

    goes_on = config.rollout == "self" and config.continuation_prob > 0
    _, height, width, channels = recipe.latent_shape
    functions = dmd.DistillFunctions(
        rollout=student_rollout(recipe),
        teacher=causal_teacher if config.teacher == "causal" else bidirectional,
        fake=functools.partial(bidirectional, net=recipe.fake_score),
        past_shape=(recipe.causal.past_frames(), height, width, channels) if goes_on else None,
    )

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=None if layout is None else (layout, None))
    def update(state, teacher, batches):
        return dmd.dmd_cycle(
            state,
            teacher,
            batches,
            null_text,
            jax.random.key(config.seed),
            functions=functions,
            diffusion=recipe.diffusion,
            distill=config,
            **hosted,
        )

    latents = {"latents": recipe.latent_shape} if config.rollout == "data" else {}
    arrays = _arrays(recipe, config.batch_size, **latents)
    cycles = config.critic_steps + 1
    teacher = transformer.spec(recipe.teacher)
    return Step(
        starts=(transformer.spec(recipe.student), transformer.spec(recipe.fake_score)),
        init=functools.partial(dmd.init_state, **optimizers, window=config.bad_loss_window),
        frozen=(teacher,),
        update=update,
        layout=layout,
        batch={k: jax.ShapeDtypeStruct((cycles, *v.shape), v.dtype) for k, v in arrays.items()},
        leading=1,
    )
