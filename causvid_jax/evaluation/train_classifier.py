"""Training of the classifier on single frames of the handwriting split ``"classifier"``, minutes on a CPU."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from causvid_jax.config import DataConfig, VideoConfig
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier as classifiers
from causvid_jax.evaluation import metrics

BATCH = 64
STEPS = 3000
LEARNING_RATE = 3e-3


def place(key: jax.Array, mask: jax.Array, height: int, width: int) -> jax.Array:
    """Place a digit ``[S, S]``, slightly turned, stretched and slanted, anywhere on the torus: ``[H, W]`` in [0, 1]."""
    where, turn, stretch, slant = jax.random.split(key, 4)
    size = jnp.array([height, width], jnp.float32)
    centre = jax.random.uniform(where, (2,)) * size
    angle = jax.random.uniform(turn, minval=-0.25, maxval=0.25)
    scale = jnp.exp(jax.random.uniform(stretch, (2,), minval=-0.15, maxval=0.15))
    shear = jax.random.uniform(slant, minval=-0.2, maxval=0.2)
    rotate = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    inverse = rotate @ jnp.array([[1.0, 0.0], [shear, 1.0]]) @ jnp.diag(scale)
    pixels = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1)
    offset = (pixels - centre + size / 2) % size - size / 2  # the shortest way round, [H, W, 2]
    source = offset @ inverse.T + (mask.shape[0] - 1) / 2
    return jax.scipy.ndimage.map_coordinates(mask, [source[..., 0], source[..., 1]], order=1, mode="constant")


def augment_frame(key: jax.Array, mask: jax.Array, color: jax.Array, height: int, width: int) -> jax.Array:
    """Make one training frame ``[H, W, 3]`` in [0, 1]: placed, blurred, coloured, dimmed and with noise.

    ``mask [S, S]`` in [0, 1] is the digit, ``color [3]`` in [0, 1] its colour.
    """
    spot, blur, dim, tint, level, noise = jax.random.split(key, 6)
    gray = place(spot, mask, height, width)
    side = jax.random.uniform(blur, maxval=0.25)  # weights (side, 1 - 2 side, side) along each axis
    for axis in (0, 1):
        gray = (1 - 2 * side) * gray + side * (jnp.roll(gray, 1, axis) + jnp.roll(gray, -1, axis))
    tinted = jnp.clip(color + jax.random.uniform(tint, (3,), minval=-0.15, maxval=0.15), 0.0, 1.0)
    frame = gray[..., None] * tinted * jax.random.uniform(dim, minval=0.6, maxval=1.1)
    grain = jax.random.normal(noise, frame.shape) * jax.random.uniform(level, maxval=0.08)
    return jnp.clip(frame + grain, 0.0, 1.0)


def _optimizer(steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(100, steps // 4), steps)
    return optax.adamw(schedule, weight_decay=1e-2)


def _loss(params: dict[str, Any], frames: jax.Array, digit: jax.Array, color: jax.Array) -> jax.Array:
    digit_logits, color_logits, _ = classifiers.classify(params, frames)
    targets = optax.smooth_labels(jax.nn.one_hot(digit, 10), 0.05)
    loss = optax.softmax_cross_entropy(digit_logits, targets)
    return jnp.mean(loss + 0.2 * optax.softmax_cross_entropy_with_integer_labels(color_logits, color))


@functools.partial(jax.jit, static_argnames=("height", "width", "steps"), donate_argnames=("params", "state"))
def _update(
    params: dict[str, Any],
    state: optax.OptState,
    step: jax.Array | int,
    root: jax.Array,
    masks: jax.Array,
    labels: jax.Array,
    palette: jax.Array,
    *,
    height: int,
    width: int,
    steps: int,
) -> tuple[dict[str, Any], optax.OptState, jax.Array]:
    pick, tone, change = jax.random.split(jax.random.fold_in(root, step), 3)
    index = jax.random.randint(pick, (BATCH,), 0, len(masks))
    color = jax.random.randint(tone, (BATCH,), 0, len(palette))
    augment = jax.vmap(lambda k, m, c: augment_frame(k, m, c, height, width))
    frames = augment(jax.random.split(change, BATCH), masks[index], palette[color])
    loss, grads = jax.value_and_grad(_loss)(params, frames, labels[index], color)
    updates, state = _optimizer(steps).update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(
    data: DataConfig, video: VideoConfig, *, steps: int = STEPS, seed: int = 0, log: Callable[[int, float], None]
) -> classifiers.Classifier:
    """Train a classifier for the digits and colours of ``data``; the same arguments give the same classifier.

    Args:
        data: digit size and colours.
        video: frame size.
        steps: of AdamW, with a cosine schedule, on ``BATCH`` frames each.
        seed: of the initialisation and the augmentation.
        log: called with (step, mean loss since the last call) every 100 steps and at the end.
    """
    images, labels, _ = digits.handwriting("classifier", data.handwriting)
    masks = jnp.asarray(digits.resize(images, data))
    targets = jnp.asarray(labels)
    palette = jnp.asarray(np.array([digits.COLORS[name] for name in data.colors]) / 255.0, jnp.float32)
    params = jax.tree.map(jnp.asarray, classifiers.init(seed, len(data.colors)))
    state, losses = _optimizer(steps).init(params), []
    for step in range(steps):
        params, state, loss = _update(
            params,
            state,
            np.int32(step),
            jax.random.key(seed),
            masks,
            targets,
            palette,
            height=video.height,
            width=video.width,
            steps=steps,
        )
        losses.append(loss)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            log(step + 1, float(np.mean(jax.device_get(losses))))
            losses = []
    return classifiers.Classifier(jax.device_get(params), data.colors, data.digit_size, data.handwriting)


def accuracy(classifier: classifiers.Classifier, data: DataConfig, video: VideoConfig, split: str) -> dict[str, float]:
    """Return ``metrics.accuracies`` on one clip of every digit of ``split``, in random colours and directions."""
    images, labels, _ = digits.handwriting(split, data.handwriting)
    rng = np.random.default_rng(0)
    data = dataclasses.replace(data, digits_per_clip=1)
    clips, targets = [], []
    for image, label in zip(images, labels, strict=True):
        spec = digits.Digit(int(label), str(rng.choice(data.colors)), str(rng.choice(list(digits.DIRECTIONS))))
        start = (int(rng.integers(video.height)), int(rng.integers(video.width)))
        clips.append(digits.render([image], [spec], [start], data, video.frames, video.height, video.width))
        targets.append([(spec.digit, spec.color, spec.direction)])
    return metrics.accuracies(classifiers.read(classifier, np.stack(clips), data=data).triples, targets)
