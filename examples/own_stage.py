"""A training stage of your own: flow matching with logit-normal timesteps (arXiv 2403.03206) in 20 lines.

A stage needs a loss ``(params, batch, key) -> (loss, metrics)``. ``make_train_step`` adds accumulation, clipping, the
guard against bad losses, the optimizer and the EMA. Here a tiny transformer learns latents that are constant per clip.

    python examples/own_stage.py
"""

import jax
import jax.numpy as jnp

from causvid_jax.config import OptimizerConfig, StageConfig, TransformerConfig
from causvid_jax.diffusion import flow
from causvid_jax.models import transformer
from causvid_jax.training import update
from causvid_jax.training.optimizers import make_optimizer

NETWORK = TransformerConfig(
    dim=24, ffn_dim=48, num_heads=2, num_layers=1, in_channels=4, out_channels=4, text_dim=8, text_length=3, freq_dim=16
)
STAGE = StageConfig(steps=200, optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10, ema_decay=0.9))


def loss(params, batch, key):
    """Return the mean squared velocity error at noise levels ``sigma = sigmoid(normal)``, and metrics."""
    x0, prompt_embeds = batch["latents"], batch["prompt_embeds"]
    noise_key, time_key = jax.random.split(key)
    sigma = jax.nn.sigmoid(jax.random.normal(time_key, (len(x0), 1))) * jnp.ones(x0.shape[:2])  # one per clip
    noise = jax.random.normal(noise_key, x0.shape)
    x_t, timestep = flow.add_noise(x0, noise, sigma), flow.timestep_from_sigma(sigma)
    velocity = transformer.bidirectional(params, x_t, timestep, prompt_embeds, config=NETWORK)
    value = jnp.mean(jnp.square(velocity - flow.velocity_from(x0, noise)))
    return value, {"loss": value}


def main(steps: int = STAGE.steps) -> list[float]:
    """Train for ``steps`` updates and return their losses."""
    params = transformer.init(jax.random.key(0), NETWORK)
    optimizer = make_optimizer(STAGE.optimizer, STAGE.steps)
    state = update.init_state(params, optimizer)
    train_step = update.make_train_step(loss, optimizer, STAGE)
    level = jax.random.normal(jax.random.key(1), (8, 1, 1, 1, 4))
    batch = {"latents": jnp.broadcast_to(level, (8, 2, 4, 4, 4)), "prompt_embeds": jnp.zeros((8, 3, 8))}
    losses = []
    for step in range(steps):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        if step % 50 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
