"""Distillation of the student (CausVid, section 4.2, Algorithm 1): state, scores, updates, loop.

One train step is K updates of the critic (the fake score) and one update of the student with its EMA. The real score is
the frozen teacher. The losses are in :mod:`causvid_jax.distill.dmd`, the student's rollouts in
:mod:`causvid_jax.distill.rollout`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from causvid_jax.config import DistillStageConfig, Recipe, require
from causvid_jax.data import pictures
from causvid_jax.diffusion import flow
from causvid_jax.distill import dmd, gan, sid
from causvid_jax.distill.replay import replay_rollout
from causvid_jax.distill.rollout import data_rollout, self_rollout
from causvid_jax.models import adapters, transformer
from causvid_jax.models.image_branch import conditioned, has_branch
from causvid_jax.sharding.params import init_tree
from causvid_jax.sharding.placement import Placement, batch_sharding
from causvid_jax.text import encoder
from causvid_jax.training import guard, samples, weights
from causvid_jax.training.dmd_data import (
    Batch,
    batch_shapes,
    clip_shape,
    end_of_rollout,
    loss_window,
    no_past,
    read_batches,
    with_context,
)
from causvid_jax.training.dmd_scores import (
    critic_spec,
    fake_params,
    fake_score,
    real_score,
    score_levels,
    score_options,
    scored,
    shares_base,
    student_rollout,
)
from causvid_jax.training.optimizers import make_optimizer
from causvid_jax.training.run import Run
from causvid_jax.training.update import (
    Trainable,
    TrainStep,
    apply_update,
    history_shardings,
    init_trainable,
    trainable_shardings,
)

Metrics = dict[str, jax.Array]

# ---- state -----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DMDState:
    """Everything that changes during distillation.

    Attributes:
        student: the generator, with its EMA.
        critic: the fake score, which may have another size; without an EMA. If it shares the student's base, only its
            adapters (:func:`~causvid_jax.training.dmd_scores.fake_params`).
        step: number of steps of which at least one update was applied; int32 scalar.
        history: recent losses of the critic (row 0) and the student (row 1).
        past: the end of the critic's last rollout of ``train_distill.batch_size`` clips, which the next one may
            continue (:func:`~causvid_jax.training.dmd_data.no_past`); None if rollouts never continue others. Steps of
            another batch size (``curriculum``) begin without a past and leave this one as it is.
    """

    student: Trainable
    critic: Trainable
    step: jax.Array
    history: guard.LossHistory
    past: Batch | None = None


class Optimizers(NamedTuple):
    """The optimizers of the two networks."""

    student: optax.GradientTransformation
    critic: optax.GradientTransformation


def make_optimizers(config: DistillStageConfig) -> Optimizers:
    """Return the optimizers that ``train_distill`` describes; the critic takes ``critic_steps`` steps per cycle."""
    return Optimizers(
        make_optimizer(config.optimizer, config.steps),
        make_optimizer(config.critic_optimizer, config.steps * config.critic_steps),
    )


def init_state(
    student: Any, critic: Any, optimizers: Optimizers, window: int = guard.WINDOW, past: Batch | None = None
) -> DMDState:
    """Return the state before the first step, of the parameters of both networks and ``no_past`` of the recipe."""
    return DMDState(
        student=init_trainable(student, optimizers.student),
        critic=init_trainable(critic, optimizers.critic, ema=False),
        step=jnp.zeros((), jnp.int32),
        history=guard.init_history(window, losses=2),
        past=past,
    )


def new_state(student: Any, critic: Any, *, recipe: Recipe, optimizers: Optimizers) -> DMDState:
    """Return :func:`init_state` of a run of ``recipe``, traceable."""
    return init_state(student, critic, optimizers, recipe.train_distill.bad_loss_window, no_past(recipe))


def state_shardings(recipe: Recipe, placement: Placement, optimizers: Optimizers) -> DMDState | None:
    """Return the shardings of the state; None without a mesh."""
    if placement.mesh is None:
        return None
    student, critic = recipe.student, recipe.fake_score
    split = batch_sharding(placement.mesh, placement.rules)
    past = {"latents": split, "text": split, "rollouts": placement.replicated()}
    return DMDState(
        student=trainable_shardings(placement, transformer.spec(student), student.rules, optimizers.student),
        critic=trainable_shardings(placement, critic_spec(recipe), critic.rules, optimizers.critic, ema=False),
        step=cast(Any, placement.replicated()),
        history=history_shardings(placement),
        past=past if recipe.train_distill.continuation_prob else None,
    )


# ---- networks --------------------------------------------------------------------------------------------------------


def generate(
    params: Any, batch: Batch, key: jax.Array, *, recipe: Recipe
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Return the student's x0 ``[B, F, h, w, C]``, the mask ``[B, F]`` of frames that count (None: all), and the end.

    ``train_distill.rollout`` and ``gradient`` name the kind of rollout; F is the length of its loss window. The end
    gives a rollout that continues this one its context (``dmd_data.end_of_rollout``); None if rollouts never do.
    """
    config, causal, picture = recipe.train_distill, recipe.causal, pictures.picture_of(batch)
    if config.rollout == "data":
        network = conditioned(transformer.block_causal, picture, recipe.student)
        velocity = functools.partial(network, config=recipe.student, causal=causal)
        sizes = causal.block_sizes(batch["latents"].shape[1])
        x0, noisy = data_rollout(
            velocity,
            params,
            batch["latents"],
            batch["text"],
            key,
            timesteps=flow.student_timesteps(recipe.diffusion),
            block_sizes=sizes,
            include_clean=config.include_clean,
        )
        return x0, noisy if config.include_clean and config.mask_clean else None, None
    shape = (len(batch["text"]), *clip_shape(recipe))
    run = self_rollout if config.gradient == "stop" else replay_rollout
    options: dict[str, Any] = {}
    if "context" in batch:
        options = {"context": batch["context"], "has_context": batch["has_context"][0]}
    if picture is not None and has_branch(recipe.student):
        options["picture"] = picture
    x0 = run(student_rollout(recipe), params, batch["text"], key, shape=shape, **options)
    end = end_of_rollout(x0, batch, causal) if "context" in batch else None
    return *loss_window(x0, key, config, causal, options.get("has_context")), end


# ---- updates ---------------------------------------------------------------------------------------------------------


OBJECTIVES: dict[str, Callable[..., tuple[jax.Array, Metrics]]] = {
    "dmd": dmd.generator_loss,
    "sid": sid.generator_loss,
    "dmd_gan": gan.generator_loss,
}
"""``train_distill.objective`` to the student's loss."""


def discriminator(critic: Any, recipe: Recipe) -> gan.Discriminator:
    """Return the discriminator on the features of the fake score."""
    return functools.partial(gan.discriminator, critic, config=recipe.fake_score, distill=recipe.train_distill)


CriticCarry = tuple[Trainable, guard.LossHistory, Batch | None]


def critic_update(
    carry: CriticCarry,
    inputs: tuple[Batch, jax.Array],
    *,
    student: Any,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    finite: jax.Array,
) -> tuple[CriticCarry, Metrics]:
    """Update the critic by flow matching on the student's outputs (CausVid, equation 2); the step of a scan.

    Args:
        carry: the critic, the history, and the end of the previous rollout with its prompts (``DMDState.past``).
        inputs: a batch, and the key of this update.
        student: its parameters, constant.
        optimizer, recipe, finite: as in :func:`apply_update` and :func:`train_step`.

    Returns:
        The next carry, with the end of this rollout unless the update was refused, and the metrics.
    """
    (critic, history, previous), config = carry, recipe.train_distill
    batch, key = with_context(inputs[0], previous, inputs[1], config, recipe.causal)

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        rollout_key, loss_key = jax.random.split(key)
        x0, mask, end = generate(student, batch, rollout_key, recipe=recipe)
        levels = score_levels(rollout_key, x0.shape[1], recipe)
        x, mask, text = scored(x0, mask, batch["text"], recipe)
        settings: dict[str, Any] = {"diffusion": recipe.diffusion, "distill": config, "mask": mask, "levels": levels}
        options = score_options(x, batch, loss_key, recipe)
        settings["fake"] = functools.partial(fake_score, fake_params(params, student, recipe), **options)
        if config.objective == "dmd_gan":
            loss, metrics = gan.critic_loss(
                x, batch["latents"], text, loss_key, discriminator=discriminator(params, recipe), **settings
            )
        else:
            loss, metrics = dmd.critic_loss(x, text, loss_key, **settings)
        return loss, metrics if end is None else metrics | {"end": end}

    critic, history, applied, metrics = apply_update(
        critic,
        loss_fn,
        batch,
        key,
        history,
        jnp.zeros((), jnp.int32),
        optimizer=optimizer,
        config=config,
        row=0,
        finite=finite,
    )
    if previous is not None:
        rollouts = jnp.where(batch["has_context"][0], previous["rollouts"], 0) + 1
        end = {"latents": metrics.pop("end"), "text": batch["text"], "rollouts": rollouts}
        previous = guard.select(applied, end, previous)
    return (critic, history, previous), metrics


def student_update(
    student: Trainable,
    history: guard.LossHistory,
    batch: Batch,
    key: jax.Array,
    *,
    step: jax.Array,
    teacher: Any,
    critic: Any,
    negative_prompt_embeds: jax.Array,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    finite: jax.Array,
) -> tuple[Trainable, guard.LossHistory, jax.Array, Metrics]:
    """Update the student by its objective (for DMD: CausVid, equation 4).

    ``teacher`` and ``critic`` are all parameters of the two scores and constant; ``negative_prompt_embeds`` are
    ``[S, E]``. Other arguments are those of :func:`apply_update`.

    Returns:
        The student, the history, whether the update was applied, and the metrics.
    """

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        rollout_key, loss_key = jax.random.split(key)
        x0, mask, _ = generate(params, batch, rollout_key, recipe=recipe)
        levels = score_levels(rollout_key, x0.shape[1], recipe)
        x, mask, text = scored(x0, mask, batch["text"], recipe)
        options = score_options(x, batch, loss_key, recipe)
        settings: dict[str, Any] = {
            "teacher": functools.partial(real_score, teacher, **options),
            "fake": functools.partial(fake_score, critic, **options),
            "diffusion": recipe.diffusion,
            "distill": recipe.train_distill,
            "mask": mask,
            "levels": levels,
            "experts": recipe.experts,
        }
        objective = recipe.train_distill.objective
        if objective == "dmd_gan":
            settings["discriminator"] = discriminator(critic, recipe)
        return OBJECTIVES[objective](x, text, negative_prompt_embeds, loss_key, **settings)

    return apply_update(
        student,
        loss_fn,
        batch,
        key,
        history,
        step,
        optimizer=optimizer,
        config=recipe.train_distill,
        row=1,
        finite=finite,
    )


def train_step(
    state: DMDState,
    teacher: Any,
    batches: Batch,
    negative_prompt_embeds: jax.Array,
    *,
    optimizers: Optimizers,
    recipe: Recipe,
    frames: int | None = None,
) -> tuple[DMDState, Metrics]:
    """Take K = ``critic_steps`` critic updates, then one student update (CausVid, Algorithm 1).

    All keys are split from ``fold_in(key(seed), step)``, so a resumed run continues bit for bit.

    Args:
        state: safe to donate.
        teacher: parameters of the real score, constant.
        batches: arrays ``[K + 1, B, ...]`` of :func:`batch_shapes`: one per critic update, the last for the student.
        negative_prompt_embeds: embeddings of the negative prompt, ``[S, E]``.
        optimizers: made the two ``opt`` of ``state``.
        recipe: networks, grid, ``train_distill``.
        frames: static length of rollouts in latent frames, 0 for the full clip; None: ``train_distill.frames``.

    Returns:
        The next state and scalar metrics: ``generator_*``, ``critic_*`` as means over the K updates, and the numbers of
            ``applied`` and ``skipped`` updates among the K + 1 (``skipped_total``: since the start). A refused update
            does not change its network. If an input is not finite, no update is applied.

    Raises:
        ConfigError: there are not K + 1 batches, or the blocks do not fit ``frames``.
    """
    if frames is not None:
        recipe = dataclasses.replace(recipe, train_distill=dataclasses.replace(recipe.train_distill, frames=frames))
    config, updates, count = recipe.train_distill, recipe.train_distill.critic_steps, len(batches["text"])
    require(count == updates + 1, f"{count} batches for {updates} critic updates and one student update")
    critic_key, student_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
    shared: dict[str, Any] = {"recipe": recipe, "finite": guard.all_finite(batches)}
    update = functools.partial(critic_update, student=state.student.params, optimizer=optimizers.critic, **shared)
    past, size = state.past, batches["text"].shape[1]
    kept = past is None or len(past["text"]) == size
    start = state.critic, state.history, past if kept else no_past(recipe, size)
    inputs = jax.tree.map(lambda a: a[:updates], batches), jax.random.split(critic_key, updates)
    (critic, history, past), critic_metrics = jax.lax.scan(update, start, inputs)
    last = with_context(jax.tree.map(lambda a: a[updates], batches), past, student_key, config, recipe.causal)
    student, history, _, metrics = student_update(
        state.student,
        history,
        *last,
        step=state.step,
        teacher=teacher,
        critic=fake_params(critic.params, state.student.params, recipe),
        negative_prompt_embeds=negative_prompt_embeds,
        optimizer=optimizers.student,
        **shared,
    )
    skipped = history.skipped - state.history.skipped
    metrics = {f"generator_{name}": value for name, value in metrics.items()}
    metrics |= {f"critic_{name}": jnp.mean(value) for name, value in critic_metrics.items()}
    metrics |= {"skipped": skipped, "applied": updates + 1 - skipped, "skipped_total": history.skipped}
    # Count the step if only the student's update was refused; otherwise the next step would repeat the critic's noise.
    step = jnp.where(skipped <= updates, state.step + 1, state.step)
    return DMDState(student, critic, step, history, past if kept else state.past), metrics


def compiled_step(recipe: Recipe, placement: Placement) -> TrainStep:
    """Return the jitted :func:`train_step` without its static arguments; it donates the state."""
    plain = make_optimizers(recipe.train_distill)
    shardings = state_shardings(recipe, placement, plain)
    student, critic = recipe.student, recipe.fake_score
    offloaded = Optimizers(
        placement.offloaded(plain.student, adapters.split(transformer.spec(student))[0], student.rules),
        placement.offloaded(plain.critic, adapters.split(critic_spec(recipe))[0], critic.rules),
    )
    return jax.jit(
        functools.partial(train_step, optimizers=offloaded, recipe=recipe),
        donate_argnums=0,
        static_argnames="frames",
        out_shardings=None if shardings is None else (shardings, None),
    )


# ---- loop ------------------------------------------------------------------------------------------------------------


def first_critic(run: Run, student: Any, teacher: Any) -> Any:
    """Return the initial parameters of the fake score, in new buffers.

    They are a copy of the student's or the teacher's (``critic_init``). If the teacher is causal and the fake score has
    another forward mode, it starts from the bidirectional teacher instead. If the fake score shares the student's base,
    the result is only its adapters. With ``objective="dmd_gan"`` a new discriminator's head is added.
    """
    recipe, config = run.recipe, run.recipe.train_distill
    if shares_base(recipe):
        return jax.tree.map(jnp.copy, adapters.split(student)[0])
    if config.critic_init == "teacher" and config.teacher == "causal" and config.critic_mode != "causal":
        critic = weights.load_network(run, "teacher", recipe.teacher)
    else:
        # The critic's parameters are copied: a donated state shares no buffer with the teacher.
        critic = jax.tree.map(jnp.copy, student if config.critic_init == "student" else teacher)
    if config.objective != "dmd_gan":
        return critic
    head, rules = {gan.HEAD: gan.head_spec(recipe.fake_score, config)}, recipe.fake_score.rules
    make = functools.partial(init_tree, jax.random.key(config.seed), head)
    return critic | run.placement.init(make, run.placement.params(head, rules))


def train_distill(run: Run, init_from: pathlib.Path | None = None) -> None:
    """Distil the student from ``init_from``, else from the stage that ``train_distill.init`` names.

    Raises:
        ConfigError: weights or data are missing or do not fit, or clips are longer than positions allow.
    """
    weights.check_sink_positions(run.recipe, run.name)
    vae_params, recipe = weights.measured_vae(run.recipe, run.workdir)
    config, placement = recipe.train_distill, run.placement
    reader = weights.open_encoder(run)
    negative_prompt_embeds = jnp.asarray(encoder.negative_prompt_embeds(reader))
    teacher = weights.load_teacher(run, "causal" if config.teacher == "causal" else "teacher")
    start = {"ode": "init", "consistency": "consistency", "teacher": "teacher"}[config.init]
    student = weights.load_network(run, start, recipe.student, init_from)
    critic = first_critic(run, student, teacher)
    optimizers = make_optimizers(config)
    init = functools.partial(new_state, recipe=recipe, optimizers=optimizers)
    state = run.restore(placement.init(init, state_shardings(recipe, placement, optimizers), student, critic))
    del student, critic
    step, names = compiled_step(recipe, placement), batch_shapes(recipe)
    sample = samples.stream_sampler(run, recipe, vae_params, reader)

    def to_device(batch: Batch) -> Batch:
        values = weights.with_text(batch, reader, names)
        split = {name: x.reshape(config.critic_steps + 1, -1, *x.shape[1:]) for name, x in values.items()}
        return placement.batch(split, leading=1)

    state = run.loop(
        state,
        lambda state, batch: step(state, teacher, batch, negative_prompt_embeds, frames=run.frames),
        functools.partial(read_batches, run),
        to_device,
        lambda state: sample(state.student.averaged),
    )
    weights.finish(run, state.student, recipe, recipe.student)
