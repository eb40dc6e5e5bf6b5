"""Tiny recipe, networks, parameters and working directory that tests of several rooms share.

Use these instead of own copies: the same shapes compile once.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from causvid_jax.checkpoints import store
from causvid_jax.checkpoints import workdir as stage_files
from causvid_jax.config import CLIPConfig, Recipe, from_config_dict
from causvid_jax.data import arrays, digits, pictures
from causvid_jax.diffusion import flow
from causvid_jax.evaluation import classifier
from causvid_jax.models import clip_vision, taehv, transformer, vae
from causvid_jax.sharding.placement import place
from causvid_jax.training import dmd, stages
from causvid_jax.training.run import Run
from tests import tiny_config


def tiny_recipe(**changes: Any) -> Recipe:
    """Return the recipe of ``tiny_config.py``; ``train_init={"steps": 1}`` changes fields, a network's likewise."""
    return from_config_dict(_merge(tiny_config.get_config().to_dict(), changes))


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        old = values.get(name)
        values[name] = _merge(dict(old), value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return values


def stream_recipe(frames: int = 21, **causal: Any) -> Recipe:
    """Return the tiny recipe with blocks of two latents, two layers, four steps; ``causal`` changes that group."""
    return tiny_recipe(
        video={"frames": frames},
        teacher={"num_layers": 2},
        student={"num_layers": 2},
        causal={"frames_per_block": 2, "window": 0, **causal},
        diffusion={"denoising_timesteps": (1000.0, 750.0, 500.0, 250.0)},
    )


def changed(config: Any, /, **changes: Any) -> Any:
    """Return a config with changed fields; ``causal={"window": 4}`` changes fields of a group."""
    groups = {name: value for name, value in changes.items() if isinstance(value, Mapping)}
    changes |= {name: changed(getattr(config, name), **value) for name, value in groups.items()}
    return dataclasses.replace(config, **changes)


RECIPE = tiny_recipe()

NETWORK = {"dim": 32, "ffn_dim": 16, "num_heads": 2, "num_layers": 2, "in_channels": 4, "out_channels": 4}
NETWORK |= {"text_dim": 5, "text_length": 8, "freq_dim": 8}
"""Sizes of a transformer that belongs to no recipe, for tests that only lower or trace it."""

CLIP = CLIPConfig(image_size=8, patch_size=4, dim=80, ffn_dim=24, num_heads=1, num_layers=2, projection_dim=3)
BRANCH = {"in_channels": 12, "image_dim": 80, "image_tokens": 5}
IMAGE = {"teacher": BRANCH, "student": BRANCH, "train_causal": {"prompt_switch_prob": 0.0, "steps": 2}}
"""Changes of :func:`tiny_recipe` for networks with an image branch, whose image encoder is :data:`CLIP`."""


def random_params(params: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Return ``params`` (arrays or shapes) with normal noise of ``scale`` added, as numpy float32.

    A fresh network has zeros where a random one has none (its head, its gates), and much cannot be tested at zero.
    """
    rng = np.random.default_rng(seed)

    def noisy(leaf: Any) -> np.ndarray:
        start = np.zeros(leaf.shape, np.float32) if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(leaf)
        return start + scale * rng.standard_normal(leaf.shape).astype(np.float32)

    return jax.tree.map(noisy, params)


def random_transformer(config: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Return random parameters of a transformer of the sizes ``config``."""
    return random_params(transformer.init(jax.random.key(seed), config), seed, scale)


def tiny_workdir(folder: pathlib.Path, recipe: Recipe = RECIPE, examples: int = 24) -> pathlib.Path:
    """Fill ``folder`` with random weights of every stage and random datasets of latents and trajectories.

    No stage is trained, so this takes a second. Clips of pixels are not written.
    """
    for seed, stage in enumerate(("teacher", "causal", "init", "distill")):
        config = recipe.teacher if stage in ("teacher", "causal") else recipe.student
        store.save_params(stage_files.stage_path(folder, stage), random_transformer(config, seed, 0.05), {})
    store.save_params(stage_files.stage_path(folder, "vae"), vae.init(jax.random.key(4), recipe.vae), {})
    store.save_params(stage_files.stage_path(folder, "taehv"), taehv.init(jax.random.key(5), recipe.taehv), {})
    rng = np.random.default_rng(0)
    captions = digits.captions(recipe.data, "train")
    states = len(recipe.diffusion.denoising_timesteps) + 1
    for name, key, shape in (
        ("latents", "latents", recipe.latent_shape),
        ("trajectories", "trajectory", (states, *recipe.latent_shape)),
    ):
        shapes = {key: shape, **pictures.shapes(recipe)}
        rows = [
            {part: rng.standard_normal(size).astype(np.float16) for part, size in shapes.items()}
            | {"caption": captions[i % len(captions)]}
            for i in range(examples)
        ]
        arrays.write_dataset(
            folder / "data" / name,
            name=name,
            features=arrays.array_features(**shapes),
            chunks=1,
            make_chunk=lambda _, rows=rows: rows,
            identity={},
            progress=False,
        )
    return folder


def save_classifier(folder: pathlib.Path) -> None:
    """Write a classifier of random weights for :data:`RECIPE` to ``folder``."""
    data = RECIPE.data
    random = classifier.Classifier(classifier.init(0, len(data.colors)), data.colors, data.digit_size)
    classifier.save(folder / "classifier.safetensors", random)


def image_workdir(folder: pathlib.Path, recipe: Recipe) -> pathlib.Path:
    """Fill ``folder`` like :func:`tiny_workdir` for a recipe of :data:`IMAGE`, with random weights of its CLIP."""
    place = tiny_workdir(folder, recipe)
    clip = random_params(clip_vision.abstract(CLIP), 8)
    store.save_params(stage_files.stage_path(place, "image_encoder"), clip, {})
    return place


def gaussian_velocity(x: jax.Array, timestep: jax.Array, mean: Any, std: Any) -> jax.Array:
    """Return ``E[noise - x0 | x_t]`` for data ``N(mean, std^2)``, the velocity of a perfect network."""
    sigma = flow.expand(timestep / 1000, x)
    gain = (sigma - (1 - sigma) * std**2) / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return -mean + gain * (x - (1 - sigma) * mean)


def collect(steps: Iterable[tuple[Any, Any]]) -> tuple[np.ndarray, Any]:
    """Return all frames of ``pipe.frames`` and its like, joined, and the state after the last ones."""
    parts = list(steps)
    return np.concatenate([part for part, _ in parts], axis=1), parts[-1][1]


def watch_dmd_steps(monkeypatch: Any, watch: Callable[..., Any]) -> None:
    """Call ``watch(step, state, *inputs, **options)`` for each step of the distillation, instead of the step."""
    compiled = dmd.compiled_step
    monkeypatch.setattr(dmd, "compiled_step", lambda *given: functools.partial(watch, compiled(*given)))


class RecordedRun(Run):
    """A run of a few steps without checkpoints, samples and export, for tests of what a trainer wires together.

    Attributes:
      states: the state before the first step and after each one, on the host.
      batches_read: the batch of every step.
      records: the metrics of every step, as floats.
    """

    def __init__(self, name: str, recipe: Recipe, workdir: pathlib.Path):
        config = dataclasses.replace(getattr(recipe, f"train_{name}"), samples=0)
        rules = recipe.teacher.rules if name in ("teacher", "causal") else recipe.student.rules
        super().__init__(name, recipe, config, workdir, place(recipe.parallel, rules))
        self.states: list[Any] = []
        self.batches_read: list[Any] = []
        self.records: list[dict[str, float]] = []

    def restore(self, state: Any) -> Any:
        self.states.append(jax.tree.map(np.array, state))
        return state

    def _open(self) -> None:
        pass

    def batches(self, read: Any, to_device: Any) -> Any:
        for batch in super().batches(read, to_device):
            self.batches_read.append(jax.tree.map(np.array, batch))
            yield batch

    def after_step(self, state: Any, metrics: dict[str, jax.Array]) -> Any:
        self.step += 1
        self._pending.clear()
        self.records.append({name: float(value) for name, value in metrics.items()})
        self.states.append(jax.tree.map(np.array, state))
        return state

    def finish(self, params: Any, metadata: Any) -> None:
        self.exported = params

    def train(self) -> "RecordedRun":
        """Call the stage's trainer."""
        with self.placement.current():
            stages.TRAINERS[self.name](self, None)
        return self
