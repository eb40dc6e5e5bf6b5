"""Distribution matching distillation (paper section 4.2, Algorithm 1): state, updates, batches, loop.

One train step is K updates of the critic (the fake score) and one update of the student with its EMA. The real score is
the frozen teacher. The losses are in :mod:`causvid_jax.distill.dmd`, the student's outputs that they judge in
:mod:`causvid_jax.distill.rollout`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from causvid_jax.config import DistillStageConfig, Recipe, require
from causvid_jax.data import arrays, pipeline
from causvid_jax.data import sources as datasets
from causvid_jax.diffusion import flow
from causvid_jax.diffusion.guidance import per_branch
from causvid_jax.distill import dmd
from causvid_jax.distill.rollout import Rollout, data_rollout, self_rollout
from causvid_jax.models import adapters, transformer
from causvid_jax.sharding.placement import Placement
from causvid_jax.text import encoder
from causvid_jax.training import guard, samples, weights
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

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]

# ---- state -----------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DMDState:
    """Everything that changes during distillation.

    Attributes:
      student: the generator, with its EMA.
      critic: the fake score, which may be of another size; without an EMA.
      step: int32 scalar, steps of which at least one update was applied.
      history: recent losses of the critic (row 0) and the student (row 1).
    """

    student: Trainable
    critic: Trainable
    step: jax.Array
    history: guard.LossHistory


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


def init_state(student: Any, critic: Any, optimizers: Optimizers, window: int = guard.WINDOW) -> DMDState:
    """Return the state before the first step, of the parameters of both networks."""
    return DMDState(
        student=init_trainable(student, optimizers.student),
        critic=init_trainable(critic, optimizers.critic, ema=False),
        step=jnp.zeros((), jnp.int32),
        history=guard.init_history(window, losses=2),
    )


def state_shardings(recipe: Recipe, placement: Placement, optimizers: Optimizers) -> DMDState | None:
    """Return where the state lies on the mesh; None without one."""
    if placement.mesh is None:
        return None
    student, critic = recipe.student, recipe.fake_score
    return DMDState(
        student=trainable_shardings(placement, transformer.spec(student), student.rules, optimizers.student),
        critic=trainable_shardings(placement, transformer.spec(critic), critic.rules, optimizers.critic, ema=False),
        step=cast(Any, placement.whole()),
        history=history_shardings(placement),
    )


# ---- networks --------------------------------------------------------------------------------------------------------


def real_score(
    params: Any, x: jax.Array, timestep: jax.Array, text: jax.Array, *, clean: jax.Array, recipe: Recipe
) -> jax.Array:
    """Return the teacher's velocity, in the forward mode that ``train_distill.teacher`` names.

    The causal teacher gets what the stage ``causal`` trained it with: the clean blocks before each block, which are
    those of the student's output ``clean [B, F, h, w, C]``.
    """
    if recipe.train_distill.teacher == "bidirectional":
        return transformer.bidirectional(params, x, timestep, text, config=recipe.teacher)
    return transformer.block_causal(
        params,
        x,
        timestep,
        text,
        config=recipe.teacher,
        causal=recipe.causal,
        clean=per_branch(clean, x),
        clean_timestep=recipe.causal.context_noise,
    )


def fake_score(params: Any, x: jax.Array, timestep: jax.Array, text: jax.Array, *, recipe: Recipe) -> jax.Array:
    """Return the critic's velocity."""
    return transformer.bidirectional(params, x, timestep, text, config=recipe.fake_score)


def generate(params: Any, batch: Batch, key: jax.Array, *, recipe: Recipe) -> tuple[jax.Array, jax.Array | None]:
    """Return the student's x0 ``[B, F, h, w, C]`` and the mask ``[B, F]`` of the frames that count, None for all."""
    config, causal = recipe.train_distill, recipe.causal
    timesteps = flow.student_timesteps(recipe.diffusion)
    if config.rollout == "data":
        velocity = functools.partial(transformer.block_causal, config=recipe.student, causal=causal)
        sizes = causal.block_sizes(batch["latents"].shape[1])
        x0, noisy = data_rollout(
            velocity,
            params,
            batch["latents"],
            batch["text"],
            key,
            timesteps=timesteps,
            block_sizes=sizes,
            include_clean=config.include_clean,
        )
        return x0, noisy if config.include_clean and config.mask_clean else None
    shape = (len(batch["text"]), *clip_shape(recipe))
    rollout = Rollout(recipe.student, causal, tuple(timesteps))
    if "context" not in batch:
        return self_rollout(rollout, params, batch["text"], key, shape=shape), None
    has_context = batch["has_context"][0]
    x0 = self_rollout(
        rollout, params, batch["text"], key, shape=shape, context=batch["context"], has_context=has_context
    )
    # The teacher knows clips whose first latent frame holds one pixel frame. A continued stream has no such frame, so
    # the losses leave its place out. The scores still attend to it: their other frames are judged next to a first frame
    # that they were not trained on.
    return x0, jnp.ones(shape[:2], bool).at[:, 0].set(~has_context)


def clip_shape(recipe: Recipe) -> tuple[int, int, int, int]:
    """Return ``(F, h, w, C)`` of a rollout: the clip's, or ``train_distill.frames`` latent frames of it."""
    frames, *size = recipe.latent_shape
    return (recipe.train_distill.frames or frames, *size)  # type: ignore[return-value]


def with_frames(recipe: Recipe, frames: int) -> Recipe:
    """Return ``recipe`` with rollouts of ``frames`` latent frames (0: the full clip).

    Raises:
      ConfigError: the blocks do not fit that length, or it is shorter than the context that a rollout continues.
    """
    return dataclasses.replace(recipe, train_distill=dataclasses.replace(recipe.train_distill, frames=frames))


# ---- continued rollouts ----------------------------------------------------------------------------------------------


def no_context(batch: Batch, recipe: Recipe) -> Batch | None:
    """Return what the first rollout of a step continues: nothing; None if rollouts never continue one another."""
    config = recipe.train_distill
    if config.rollout != "self" or not config.continuation_prob:
        return None
    latents = jnp.zeros((len(batch["text"]), recipe.causal.past_frames(), *clip_shape(recipe)[1:]))
    return {"latents": latents, "text": batch["text"], "exists": jnp.array(False)}


def with_context(
    batch: Batch, previous: Batch | None, key: jax.Array, config: DistillStageConfig
) -> tuple[Batch, jax.Array]:
    """Add the context of the previous rollout to ``batch``, and return the key that is left.

    With probability ``continuation_prob`` the new rollout continues the previous one; then each clip keeps its prompt
    or, with probability ``prompt_switch_prob``, takes the one of ``batch``. ``has_context`` is ``[B]``, all equal.
    """
    if previous is None:
        return batch, key
    context_key, key = jax.random.split(key)
    continue_key, switch_key = jax.random.split(context_key)
    size = len(batch["text"])
    continued = previous["exists"] & (jax.random.uniform(continue_key) < config.continuation_prob)
    switched = jax.random.uniform(switch_key, (size, 1, 1)) < config.prompt_switch_prob
    text = jnp.where(continued & ~switched, previous["text"], batch["text"])
    context = {"context": previous["latents"], "has_context": jnp.broadcast_to(continued, size)}
    return batch | {"text": text} | context, key


# ---- updates ---------------------------------------------------------------------------------------------------------


def critic_update(
    critic: Trainable,
    history: guard.LossHistory,
    previous: Batch | None,
    batch: Batch,
    key: jax.Array,
    *,
    student: Any,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    finite: jax.Array,
) -> tuple[Trainable, guard.LossHistory, Batch | None, Metrics]:
    """Update the critic by flow matching on the student's outputs (equation 2)."""
    config = recipe.train_distill
    batch, key = with_context(batch, previous, key, config)

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        rollout_key, loss_key = jax.random.split(key)
        x0, mask = generate(student, batch, rollout_key, recipe=recipe)
        loss, metrics = dmd.critic_loss(
            x0,
            batch["text"],
            loss_key,
            fake=functools.partial(fake_score, params, recipe=recipe),
            diffusion=recipe.diffusion,
            distill=config,
            mask=mask,
        )
        return loss, metrics if previous is None else metrics | {"end": x0[:, -previous["latents"].shape[1] :]}

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
        end = {"latents": metrics.pop("end"), "text": batch["text"], "exists": jnp.array(True)}
        previous = guard.select(applied, end, previous)
    return critic, history, previous, metrics


def student_update(
    student: Trainable,
    history: guard.LossHistory,
    batch: Batch,
    key: jax.Array,
    *,
    step: jax.Array,
    teacher: Any,
    critic: Any,
    null_text: jax.Array,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    finite: jax.Array,
) -> tuple[Trainable, guard.LossHistory, jax.Array, Metrics]:
    """Update the student along the difference of the two scores (equation 4)."""

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        rollout_key, loss_key = jax.random.split(key)
        x0, mask = generate(params, batch, rollout_key, recipe=recipe)
        return dmd.generator_loss(
            x0,
            batch["text"],
            null_text,
            loss_key,
            teacher=functools.partial(real_score, teacher, clean=jax.lax.stop_gradient(x0), recipe=recipe),
            fake=functools.partial(fake_score, critic, recipe=recipe),
            diffusion=recipe.diffusion,
            distill=recipe.train_distill,
            mask=mask,
        )

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


def critic_updates(
    state: DMDState,
    batches: Batch,
    keys: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    finite: jax.Array,
) -> tuple[tuple[Trainable, guard.LossHistory, Batch | None], Metrics]:
    """Take one critic update per key on the first batches, in a scan: the last carry, and the metrics of all."""

    def update(carry: Any, inputs: Any) -> tuple[Any, Metrics]:
        *carry, metrics = critic_update(
            *carry, *inputs, student=state.student.params, optimizer=optimizer, recipe=recipe, finite=finite
        )
        return tuple(carry), metrics

    start = state.critic, state.history, no_context(jax.tree.map(lambda a: a[0], batches), recipe)
    return jax.lax.scan(update, start, (jax.tree.map(lambda a: a[: len(keys)], batches), keys))


def train_step(
    state: DMDState,
    teacher: Any,
    batches: Batch,
    null_text: jax.Array,
    *,
    optimizers: Optimizers,
    recipe: Recipe,
    frames: int | None = None,
) -> tuple[DMDState, Metrics]:
    """Take K = ``critic_steps`` critic updates, then one student update (Algorithm 1).

    Pure: randomness is ``fold_in(key(seed), step)`` split by purpose, so a resumed run continues bit for bit.

    Args:
      state: safe to donate.
      teacher: parameters of the real score, constant.
      batches: arrays ``[K + 1, B, ...]`` with an entry ``"text"`` ``[K + 1, B, S, E]`` (and ``"latents"`` for
        ``rollout="data"``): one batch per critic update, the last one for the student.
      null_text: embeddings of the negative prompt, ``[S, E]``.
      optimizers: made the two ``opt`` of ``state``.
      recipe: networks, grid, ``train_distill``.
      frames: length of self rollouts in latent frames, 0 for the full clip; None: ``train_distill.frames``.

    Returns:
      The next state and scalar metrics: ``generator_*``, ``critic_*`` as means over the K updates, and how many of the
      K + 1 updates were ``applied`` and ``skipped``. A refused update leaves its network as it was, and none is applied
      if an input is not finite.
    """
    recipe = recipe if frames is None else with_frames(recipe, frames)
    config = recipe.train_distill
    updates, count = config.critic_steps, len(batches["text"])
    require(updates >= 1, f"train_distill.critic_steps is {updates}; it must be at least 1")
    require(count == updates + 1, f"{count} batches for {updates} critic updates and one student update")
    critic_key, student_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
    shared: dict[str, Any] = {"recipe": recipe, "finite": guard.all_finite(batches)}
    (critic, history, previous), critic_metrics = critic_updates(
        state, batches, jax.random.split(critic_key, updates), optimizer=optimizers.critic, **shared
    )
    batch, key = with_context(jax.tree.map(lambda a: a[updates], batches), previous, student_key, config)
    student, history, _, metrics = student_update(
        state.student,
        history,
        batch,
        key,
        step=state.step,
        teacher=teacher,
        critic=critic.params,
        null_text=null_text,
        optimizer=optimizers.student,
        **shared,
    )
    skipped = history.skipped - state.history.skipped
    metrics = step_metrics(metrics, critic_metrics)
    metrics |= {"skipped": skipped, "applied": updates + 1 - skipped, "skipped_total": history.skipped}
    # If only the student's update was refused, the step counts: else the next one would repeat the critic's noise.
    step = jnp.where(skipped <= updates, state.step + 1, state.step)
    return DMDState(student, critic, step, history), metrics


def step_metrics(student: Metrics, critic: Metrics) -> Metrics:
    """Return the scalar metrics of a step: the student's as ``generator_*``, means of the critic's as ``critic_*``."""
    metrics = {f"generator_{name}": value for name, value in student.items()}
    return metrics | {f"critic_{name}": jnp.mean(value) for name, value in critic.items()}


def compiled_step(recipe: Recipe, placement: Placement) -> TrainStep:
    """Return the jitted :func:`train_step` without its static arguments; it donates the state."""
    plain = make_optimizers(recipe.train_distill)
    shardings = state_shardings(recipe, placement, plain)
    networks = recipe.student, recipe.fake_score
    hosted = Optimizers(
        *(
            placement.hosted(optimizer, adapters.split(transformer.spec(net))[0], net.rules)
            for optimizer, net in zip(plain, networks, strict=True)
        )
    )
    return jax.jit(
        functools.partial(train_step, optimizers=hosted, recipe=recipe),
        donate_argnums=0,
        static_argnames="frames",
        out_shardings=None if shardings is None else (shardings, None),
    )


# ---- batches ---------------------------------------------------------------------------------------------------------


def batch_shapes(recipe: Recipe) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the arrays of one step, ``[K + 1, B, ...]``."""
    config = recipe.train_distill
    shapes: dict[str, tuple[int, ...]] = {"text": (recipe.text.length, recipe.text.dim)}
    if config.rollout == "data":
        shapes["latents"] = clip_shape(recipe)
    count = config.critic_steps + 1
    return {
        name: jax.ShapeDtypeStruct((count, config.batch_size, *shape), np.float32) for name, shape in shapes.items()
    }


def read_batches(run: Run, *, batch_size: int, frames: int, seed: int) -> Iterator[Batch]:
    """Read the examples of all K + 1 batches of a step together; a self rollout needs prompts alone."""
    recipe, parts = run.recipe, range(run.recipe.train_distill.critic_steps + 1)
    # A process reads its rows of every one of the K + 1 batches.
    rows = [part * batch_size + row for part in parts for row in run.placement.rows(batch_size)]
    options: dict[str, Any] = {"batch_size": batch_size * len(parts), "seed": seed, "rows": rows}
    options["text_length"] = recipe.text.length
    if recipe.train_distill.rollout == "self" and recipe.data.prompt_file:
        source = arrays.source(datasets.folder(run.workdir, datasets.PROMPTS))
        return pipeline.prompt_batches(source, **options)
    length = frames if recipe.train_distill.rollout == "data" else 0  # of a self rollout only the captions are read
    return pipeline.latent_batches(datasets.latents(recipe, run.workdir), frames=length, **options)


# ---- loop ------------------------------------------------------------------------------------------------------------


def train_distill(run: Run, init_from: pathlib.Path | None = None) -> None:
    """Distil the student; it starts from the stage ``init``, the teacher, or the weights ``init_from``."""
    for _, frames, _ in run.config.stretches if run.recipe.train_distill.rollout == "data" else ():
        weights.check_sink_positions(run.recipe, run.name, frames)
    vae_params, recipe = weights.load_vae(run)
    config, placement = recipe.train_distill, run.placement
    reader = weights.open_encoder(run)
    null_text = jnp.asarray(encoder.null_rows(reader))
    teacher = weights.load_network(run, "causal" if config.teacher == "causal" else "teacher", recipe.teacher)
    start = "init" if config.init == "ode" else "teacher"
    student = weights.load_network(run, start, recipe.student, init_from)
    if config.critic_init == "teacher" and config.teacher == "causal":
        critic = weights.load_network(run, "teacher", recipe.teacher)  # the fake score is bidirectional
    else:
        # The critic's parameters are copied: a donated state shares no buffer with the teacher.
        critic = jax.tree.map(jnp.copy, student if config.critic_init == "student" else teacher)
    optimizers = make_optimizers(config)
    init = functools.partial(init_state, optimizers=optimizers, window=config.bad_loss_window)
    state = run.restore(placement.init(init, state_shardings(recipe, placement, optimizers), student, critic))
    del student, critic
    step, names = compiled_step(recipe, placement), batch_shapes(recipe)
    sample = samples.StreamSampler(run, recipe, vae_params, reader)

    def to_device(batch: Batch) -> Batch:
        values = {**batch, "text": weights.prompt_embeds(batch, reader)}
        split = {k: values[k].reshape(config.critic_steps + 1, -1, *values[k].shape[1:]) for k in names}
        return placement.batch(split, leading=1)

    for batch in run.batches(functools.partial(read_batches, run), to_device):
        state, metrics = step(state, teacher, batch, null_text, frames=run.frames)
        state = run.after_step(state, metrics)
        if run.samples_now:
            run.log_samples(sample(state.student.averaged))
    weights.finish(run, state.student, recipe, recipe.student)
