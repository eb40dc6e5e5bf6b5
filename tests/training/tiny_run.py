"""A least-squares run with the real run, step and pipeline, for tests of interrupted and failing runs.

As a program it says "step" when training begins and then trains: ``python tiny_run.py WORKDIR STEPS SIZE``.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.checkpoints import store
from causvid_jax.config import OptimizerConfig, Recipe, StageConfig
from causvid_jax.data import pipeline
from causvid_jax.sharding.placement import Placement
from causvid_jax.training.optimizers import make_optimizer
from causvid_jax.training.run import open_run
from causvid_jax.training.update import TrainState, init_state, make_train_step

CONFIG = StageConfig(
    steps=6,
    batch_size=4,
    log_every=1,
    samples=0,
    save_every=2,
    keep=3,
    optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=1, ema_decay=0.9),
)


class Examples:
    """Return example i: 4 numbers that depend on i alone."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"x": np.random.default_rng(index).standard_normal(4).astype(np.float32)}


def loss(params, batch, key):
    error = batch @ params["w"] - 1.0 + 0.01 * jax.random.normal(key, (len(batch),)) + 0 * params["ballast"].sum()
    value = jnp.mean(error**2)
    return value, {"loss": value}


def read_batches(*, batch_size, frames, seed):
    return pipeline.batches(Examples(), lambda example, rng: example, batch_size=batch_size, seed=seed + 3)


def initial_state(config: StageConfig = CONFIG, size: int = 8) -> TrainState:
    """``size`` numbers of ballast make the state large; they learn nothing, but they decay."""
    params = {"w": jnp.zeros(4), "ballast": jax.random.normal(jax.random.key(0), (size,))}
    return init_state(params, make_optimizer(config.optimizer, config.steps), config.bad_loss_window)


def train_step(config: StageConfig = CONFIG):
    return make_train_step(loss, make_optimizer(config.optimizer, config.steps), config)


def train(
    workdir: pathlib.Path,
    config: StageConfig = CONFIG,
    size: int = 8,
    change: Callable[[int, np.ndarray], Any] = lambda step, x: x,
    read: Callable[..., Any] = read_batches,
    before_step: Callable[[], None] = lambda: None,
    export: Callable[[Any], Any] = lambda state: {"params": state.network.params, "ema": state.network.ema},
) -> None:
    """Train; ``change(number of the batch from 1, batch)`` may change a batch."""
    numbers = iter(range(1, 10**6))
    with open_run("tiny", Recipe(name="tiny"), config, workdir, Placement()) as run:
        state, step = run.restore(initial_state(config, size)), train_step(config)
        for batch in run.batches(read, lambda batch: jnp.asarray(change(next(numbers), batch["x"]))):
            before_step()
            state, metrics = step(state, batch)
            state = run.after_step(state, metrics)
        run.finish(export(state), {})


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Return the weights that a finished run wrote."""
    return store.flatten(store.load_params(workdir / "tiny" / "weights.safetensors")[0])


if __name__ == "__main__":
    steps, size = int(sys.argv[2]), int(sys.argv[3])
    settings = dataclasses.replace(CONFIG, steps=steps, save_every=1, keep=2)
    train(pathlib.Path(sys.argv[1]), settings, size, before_step=functools.partial(print, "step", flush=True))
    print("done", flush=True)
