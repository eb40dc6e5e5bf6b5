"""The smallest run there is, for tests of what becomes of runs: least squares by the real loop, step and pipeline.

As a program it says "ready" when training begins and then trains: ``python tiny_run.py WORKDIR STEPS SIZE``.
"""

import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from causvid_jax.checkpoints import store
from causvid_jax.config import OptimizerConfig, StageConfig
from causvid_jax.data import pipeline
from causvid_jax.training import loop
from causvid_jax.training.optimizers import make_optimizer
from causvid_jax.training.state import TrainState, init_state, make_step

CONFIG = StageConfig(
    steps=6,
    batch_size=4,
    log_every=1,
    sample_every=10**6,
    save_every=2,
    keep=3,
    optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=1, ema_decay=0.9),
)


class Examples:
    """Example i is 4 numbers that only i decides."""

    def __len__(self):
        return 50

    def __getitem__(self, index):
        return {"x": np.random.default_rng(index).standard_normal(4).astype(np.float32)}


def loss(params, batch, key):
    error = batch @ params["w"] - 1.0 + 0.01 * jax.random.normal(key, (len(batch),)) + 0 * params["ballast"].sum()
    value = jnp.mean(error**2)
    return value, {"loss": value}


def make_stage(
    config: StageConfig = CONFIG, size: int = 8, change: Callable[[int, np.ndarray], Any] = lambda step, x: x
) -> loop.Stage:
    """``change(number of the batch from 1, batch)`` may spoil a batch; ``size`` numbers beside make the state large."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    numbers = iter(range(1, 10**6))

    def init() -> TrainState:
        # The ballast learns nothing, but it decays.
        params = {"w": jnp.zeros(4), "ballast": jax.random.normal(jax.random.key(0), (size,))}
        return init_state(params, optimizer, config.bad_loss_window)

    return loop.Stage(
        name="tiny",
        config=config,
        init=init,
        step=make_step(loss, optimizer, config),
        phases=(
            loop.Phase(
                config.steps,
                functools.partial(
                    pipeline.batches, Examples(), lambda example, rng: example, batch_size=config.batch_size, seed=3
                ),
            ),
        ),
        ready=lambda batch: jnp.asarray(change(next(numbers), batch["x"])),
        sample=lambda state, folder, step: {},
        export=lambda state, path: store.save_params(path, {"params": state.params, "ema": state.ema}, {}),
    )


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """What a finished run exported."""
    return store.flatten(store.load_params(workdir / "tiny" / "weights.safetensors")[0])


if __name__ == "__main__":
    import dataclasses

    steps, size = int(sys.argv[2]), int(sys.argv[3])
    config = dataclasses.replace(CONFIG, steps=steps, save_every=1, keep=2)
    stage = make_stage(config, size)
    step = stage.step

    def told(state, batch):
        print("step", flush=True)
        return step(state, batch)

    loop.train(dataclasses.replace(stage, step=told), pathlib.Path(sys.argv[1]))
    print("done", flush=True)
