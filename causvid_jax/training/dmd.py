"""One DMD cycle as one jittable function: K fake-score updates, one student update, one EMA update (paper section 4.2).

Pure: networks, rollout and optimizers are handed in, every array is in the state or an argument, and randomness is
``fold_in(key, step)`` split by purpose, so that a resumed run continues bit for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from causvid_jax.config import DiffusionConfig, DistillStageConfig, require
from causvid_jax.distill import dmd
from causvid_jax.training import guard
from causvid_jax.training.gradients import accumulated_gradient


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillState:
    """All that changes during distillation.

    Attributes:
      student: parameters of the generator.
      fake: parameters of the fake score (may be of another size).
      student_ema: their running mean, of the student's structure.
      student_opt: optax state of the student.
      fake_opt: optax state of the fake score.
      step: int32 scalar, cycles done (generator updates).
      watch: of the losses of fake score (row 0) and student (row 1).
    """

    student: Any
    fake: Any
    student_ema: Any
    student_opt: optax.OptState
    fake_opt: optax.OptState
    step: jax.Array
    watch: guard.Watch


@dataclasses.dataclass(frozen=True)
class DistillFunctions:
    """The three networks as the cycle needs them.

    Attributes:
      rollout: ``(student params, batch, key) -> (x0 [B, F, h, w, C], mask [B, F] or None)``, one of ``rollout.py``.
      teacher: ``(params, x, timestep, text) -> velocity``, the real score.
      fake: ``(params, x, timestep, text) -> velocity``, the fake score.
      past_shape: ``(P, h, w, C)``, the last P latent frames of a rollout, which the next one may go on from: it reads
        them as ``batch["past"]`` where the bool ``batch["past_shown"]`` says so. None: every rollout starts anew.
    """

    rollout: Callable[[Any, Any, jax.Array], tuple[jax.Array, jax.Array | None]]
    teacher: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
    fake: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
    past_shape: tuple[int, int, int, int] | None = None


def init_state(
    student: Any,
    fake: Any,
    student_optimizer: optax.GradientTransformation,
    fake_optimizer: optax.GradientTransformation,
    window: int = guard.WINDOW,
) -> DistillState:
    """The state before the first cycle; the EMA starts as a copy of the student, so that both can be donated."""
    return DistillState(
        student=student,
        fake=fake,
        student_ema=jax.tree.map(jnp.copy, student),
        student_opt=student_optimizer.init(student),
        fake_opt=fake_optimizer.init(fake),
        step=jnp.zeros((), jnp.int32),
        watch=guard.init_watch(window, losses=2),
    )


def follow(batch: Any, end: Any, key: jax.Array, distill: DistillStageConfig) -> Any:
    """``batch`` for a rollout that may go on where the one before it ended: its text, ``past`` and ``past_shown``.

    ``end`` holds ``latents`` and ``text`` of that rollout, and whether it ``exists``. With probability
    ``distill.continuation_prob`` the whole rollout goes on; then each clip keeps its prompt, or, with probability
    ``distill.prompt_switch_prob``, takes the batch's. ``past_shown`` is ``[B]``, all equal.
    """
    shown_key, switch_key = jax.random.split(key)
    size = len(batch["text"])
    shown = end["exists"] & (jax.random.uniform(shown_key) < distill.continuation_prob)
    switched = jax.random.uniform(switch_key, (size, 1, 1)) < distill.prompt_switch_prob
    text = jnp.where(shown & ~switched, end["text"], batch["text"])
    return batch | {"text": text, "past": end["latents"], "past_shown": jnp.broadcast_to(shown, size)}


def dmd_cycle(
    state: DistillState,
    teacher: Any,
    batches: Any,
    null_text: jax.Array,
    key: jax.Array,
    *,
    functions: DistillFunctions,
    student_optimizer: optax.GradientTransformation,
    fake_optimizer: optax.GradientTransformation,
    diffusion: DiffusionConfig,
    distill: DistillStageConfig,
) -> tuple[DistillState, dict[str, jax.Array]]:
    """K = ``distill.critic_steps`` fake-score updates, then one student update and its EMA.

    Args:
      state: the current state; safe to donate.
      teacher: parameters of the real score, constant.
      batches: a pytree of arrays ``[K + 1, B, ...]`` with an entry ``"text"`` ``[K + 1, B, S, E]`` (and whatever the
        rollout reads): one batch for every fake-score update, the last one for the student.
      null_text: the empty prompt, ``[S, E]``.
      key: the root key of the run.
      functions: the networks and the rollout.
      student_optimizer: optax optimizer that made ``state.student_opt``.
      fake_optimizer: optax optimizer that made ``state.fake_opt``.
      diffusion: the grid.
      distill: critic updates, guidance, timestep range, EMA decay (``optimizer.ema_decay``; 0: EMA is the student),
        and which updates are not taken (``guard.judge``, each on its own; none of them if an input is not finite).

    Returns:
      The next state and scalar metrics: ``generator_*``, ``critic_*`` as means over the K updates, and how many of the
      K + 1 updates were ``taken`` and ``skipped``.
    """
    updates = distill.critic_steps
    require(updates >= 1, f"distill.critic_steps is {updates}; it must be at least 1")
    given = len(batches["text"])
    require(given == updates + 1, f"{given} batches for {updates} critic updates and one student update")
    critic_key, generator_key = jax.random.split(jax.random.fold_in(key, state.step))
    sound = guard.all_finite(batches)

    def following(batch, end, key):
        if functions.past_shape is None:
            return batch, key
        follow_key, key = jax.random.split(key)
        return follow(batch, end, follow_key, distill), key

    def critic_step(carry, inputs):
        fake, opt, watch, end = carry
        batch, step_key = following(inputs[0], end, inputs[1])

        def loss_fn(fake, batch, key):
            rollout_key, loss_key = jax.random.split(key)
            x0, mask = functions.rollout(state.student, batch, rollout_key)

            def velocity(x, timestep, text):
                return functions.fake(fake, x, timestep, text)

            loss, metrics = dmd.critic_loss(
                x0, batch["text"], loss_key, fake=velocity, diffusion=diffusion, distill=distill, mask=mask
            )
            if functions.past_shape is not None:
                metrics["end"] = x0[:, -functions.past_shape[0] :]
            return loss, metrics

        gradient, metrics = accumulated_gradient(loss_fn, fake, batch, step_key, distill.accumulate)
        ended = end
        if functions.past_shape is not None:
            ended = {"latents": metrics.pop("end"), "text": batch["text"], "exists": jnp.array(True)}
        norm = optax.global_norm(gradient)
        taken, watch = guard.judge(watch, metrics["loss"], norm, distill, row=0, sound=sound)
        change, new_opt = fake_optimizer.update(gradient, opt, fake)
        new = optax.apply_updates(fake, change), new_opt, ended
        fake, opt, end = guard.choose(taken, new, (fake, opt, end))
        return (fake, opt, watch, end), metrics | {"gradient_norm": norm}

    critic_batches = jax.tree.map(lambda a: a[:updates], batches)
    end = None
    if functions.past_shape is not None:
        first = batches["text"][0]
        none = jnp.zeros((len(first), *functions.past_shape))
        end = {"latents": none, "text": first, "exists": jnp.array(False)}
    (fake, fake_opt, watch, end), critic_metrics = jax.lax.scan(
        critic_step,
        (state.fake, state.fake_opt, state.watch, end),
        (critic_batches, jax.random.split(critic_key, updates)),
    )

    def loss_fn(student, batch, key):
        rollout_key, loss_key = jax.random.split(key)
        x0, mask = functions.rollout(student, batch, rollout_key)
        return dmd.generator_loss(
            x0,
            batch["text"],
            null_text,
            loss_key,
            teacher=lambda x, timestep, text: functions.teacher(teacher, x, timestep, text),
            fake=lambda x, timestep, text: functions.fake(fake, x, timestep, text),
            diffusion=diffusion,
            distill=distill,
            mask=mask,
        )

    batch, generator_key = following(jax.tree.map(lambda a: a[updates], batches), end, generator_key)
    gradient, metrics = accumulated_gradient(loss_fn, state.student, batch, generator_key, distill.accumulate)
    norm = optax.global_norm(gradient)
    taken, watch = guard.judge(watch, metrics["loss"], norm, distill, row=1, sound=sound)
    change, student_opt = student_optimizer.update(gradient, state.student_opt, state.student)
    student = optax.apply_updates(state.student, change)

    decay = distill.optimizer.ema_decay
    student_ema = jax.tree.map(lambda mean, new: decay * mean + (1 - decay) * new, state.student_ema, student)
    student, student_ema, student_opt, step = guard.choose(
        taken,
        (student, student_ema, student_opt, state.step + 1),
        (state.student, state.student_ema, state.student_opt, state.step),
    )

    metrics = metrics | {"gradient_norm": norm}
    metrics = {f"generator_{k}": v for k, v in metrics.items()}
    metrics |= {f"critic_{k}": jnp.mean(v) for k, v in critic_metrics.items()}
    skipped = watch.skipped - state.watch.skipped
    metrics |= {"skipped": skipped, "taken": updates + 1 - skipped, "skipped_total": watch.skipped}
    return DistillState(student, fake, student_ema, student_opt, fake_opt, step, watch), metrics
