"""Batches of the stage ``distill``, the context of rollouts that continue earlier ones, and the loss window."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.config import CausalConfig, DistillStageConfig, Recipe
from causvid_jax.data import arrays, pictures, pipeline
from causvid_jax.data import sources as datasets
from causvid_jax.training.run import Run

Batch = dict[str, Any]


def clip_shape(recipe: Recipe) -> tuple[int, int, int, int]:
    """Return ``(F, h, w, C)`` of a rollout: F is ``train_distill.frames`` latent frames, or the clip's if that is 0."""
    frames, *size = recipe.latent_shape
    return (recipe.train_distill.frames or frames, *size)  # type: ignore[return-value]


def no_past(recipe: Recipe, size: int = 0) -> Batch | None:
    """Return what the first rollout of a run has behind it, which is nothing; None if rollouts never continue others.

    It has ``latents`` of :func:`end_of_rollout`, ``text [B, S, E]`` of their prompts, and ``rollouts`` (int32 scalar),
    the number of rollouts of their stream so far. B is ``size``, or ``train_distill.batch_size`` if that is 0.
    """
    config = recipe.train_distill
    size = size or config.batch_size
    if not config.continuation_prob:
        return None
    frames = recipe.causal.sink_frames() + recipe.causal.context_frames()
    latents = jnp.zeros((size, frames, *clip_shape(recipe)[1:]))
    text = jnp.zeros((size, recipe.text.length, recipe.text.dim))
    return {"latents": latents, "text": text, "rollouts": jnp.zeros((), jnp.int32)}


def with_context(
    batch: Batch, previous: Batch | None, key: jax.Array, config: DistillStageConfig, causal: CausalConfig
) -> tuple[Batch, jax.Array]:
    """Return ``batch`` with the context of the previous rollout, and the next key.

    With probability ``continuation_prob`` the new rollout continues the previous one, with
    ``further_continuation_prob`` if that one continues others itself. Each clip then keeps its prompt or, with
    probability ``prompt_switch_prob``, takes the prompt of ``batch``. ``context`` is
    ``[B, P, h, w, C]`` (P = ``causal.context_frames()``), and ``has_context`` is bool ``[B]``, all equal. It is what a
    stream has in view: the sink and the last frames, or after a switch the last P frames alone
    (``sampling.stream.recompute_context``).
    """
    if previous is None:
        return batch, key
    context_key, key = jax.random.split(key)
    continue_key, switch_key = jax.random.split(context_key)
    size, rollouts = len(batch["text"]), previous["rollouts"]
    further = config.further_continuation_prob or config.continuation_prob
    probability = jnp.select([rollouts == 0, rollouts == 1], [0.0, config.continuation_prob], further)
    continued = jax.random.uniform(continue_key) < probability
    switched = jax.random.uniform(switch_key, (size, 1, 1)) < config.prompt_switch_prob
    text = jnp.where(continued & ~switched, previous["text"], batch["text"])
    sink, latents = causal.sink_frames(), previous["latents"]
    kept = jnp.concatenate([latents[:, :sink], latents[:, 2 * sink :]], axis=1)
    latents = jnp.where(switched[..., None, None], latents[:, sink:], kept)
    context = {"context": latents, "has_context": jnp.broadcast_to(continued, size)}
    return batch | {"text": text} | context, key


def end_of_rollout(x0: jax.Array, batch: Batch, causal: CausalConfig) -> jax.Array:
    """Return what a rollout that continues ``x0 [B, F, h, w, C]`` may attend to.

    These are the first blocks of the stream, which hold the sink, and its last ``causal.context_frames()`` frames. If
    x0 itself continues another rollout, the first blocks are those of its context.
    """
    first = causal.sink_frames()
    continued = jnp.expand_dims(batch["has_context"], (1, 2, 3, 4))
    sink = jnp.where(continued, batch["context"][:, :first], x0[:, :first])
    return jnp.concatenate([sink, x0[:, x0.shape[1] - causal.context_frames() :]], axis=1)


def loss_window(
    x0: jax.Array, key: jax.Array, config: DistillStageConfig, causal: CausalConfig, continued: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Return the loss window ``[B, L, h, w, C]`` of a rollout and the mask ``[B, L]`` of frames that count (None: all).

    The teacher was trained on clips whose first latent frame holds one pixel frame. A continued stream has no such
    frame. The losses therefore exclude the first frame of a ``continued`` rollout (bool scalar; None: never), and of a
    window that starts later. The scores still attend to this frame, although they were not trained on such a first
    frame. For single chunks (``teacher="chunk"``) all frames count.
    """
    later = (x0.shape[1] - config.loss_frames) // causal.frames_per_block if config.loss_frames else 0
    if not later and continued is None:
        return x0, None
    begins = jnp.array(True) if continued is None else ~continued
    if later:
        # The rollout splits keys 0 and 1 off (exit steps and noise).
        start = jax.random.randint(jax.random.fold_in(key, 2), (), 0, later + 1)
        block = start if config.loss_window == "random" else jnp.int32(later)
        x0 = jax.lax.dynamic_slice_in_dim(x0, block * causal.frames_per_block, config.loss_frames, axis=1)
        begins &= block == 0
    if config.teacher == "chunk":
        return x0, None
    return x0, jnp.ones(x0.shape[:2], bool).at[:, 0].set(begins)


def reads_latents(config: DistillStageConfig) -> bool:
    """Return whether a step needs real clips: for data rollouts, or as real examples of a discriminator."""
    return config.rollout == "data" or config.objective == "dmd_gan"


def batch_shapes(recipe: Recipe) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and types of the arrays of one step, ``[K + 1, B, ...]``, by name."""
    config = recipe.train_distill
    shapes: dict[str, tuple[int, ...]] = {"text": (recipe.text.length, recipe.text.dim)}
    if reads_latents(config):
        shapes["latents"] = clip_shape(recipe)
    shapes |= pictures.shapes(recipe, config.frames)
    count = config.critic_steps + 1
    return {
        name: jax.ShapeDtypeStruct((count, config.batch_size, *shape), np.float32) for name, shape in shapes.items()
    }


def read_batches(run: Run, *, batch_size: int, frames: int, seed: int) -> Iterator[Batch]:
    """Read this process's examples of all K + 1 batches of a step together; a self rollout needs only prompts.

    Raises:
        ConfigError: the latents or prompts are not prepared.
    """
    recipe, parts = run.recipe, range(run.recipe.train_distill.critic_steps + 1)
    # A process reads its examples of each of the K + 1 batches.
    rows = [part * batch_size + row for part in parts for row in run.placement.example_indices(batch_size)]
    options: dict[str, Any] = {"batch_size": batch_size * len(parts), "seed": seed, "rows": rows}
    options["text_length"] = recipe.text.length
    real = reads_latents(recipe.train_distill) or recipe.reads_picture
    if not real and recipe.data.prompt_file:
        source = arrays.source(datasets.folder(run.workdir, datasets.PROMPTS))
        return pipeline.example_batches(source, **options)
    length = frames if real else 0  # otherwise only the captions are read
    return pipeline.example_batches(datasets.latents(recipe, run.workdir), frames=length, **options)
