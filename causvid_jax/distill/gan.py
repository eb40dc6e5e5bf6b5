"""DMD with a logistic GAN on features of the fake score (DMD2, arXiv 2405.14867; One-Forcing, arXiv 2605.23458).

Let D(x_t, t) be the logit of a small head on features of the fake score's network at ``x_t``. Real clips and the
student's clips are noised in the same way. With w = ``gan_weight`` and w_C = ``gan_critic_weight``:

    L_G = L_DMD + w mean softplus(-D(x_t))                                   x the student's output, through x_t
    L_C = L_flow + w_C mean (softplus(-D(real_t)) + softplus(D(fake_t)))     the fake is a constant
          + r_1 mean ((D(real_t + s e) - D(real_t)) / s)^2 + r_2 (the same of fake_t)

The last line is R1 and R2, the squared slope of D at real and at generated clips. The slope is a difference along noise
e of N(0, 1), which needs no second derivative. For small s the mean of its square is ``|grad D|^2``. The weights
r_1 = ``gan_r1_weight`` and r_2 = ``gan_r2_weight`` are 0 as published; s is ``gan_r_sigma``. Source: Seaweed-APT, arXiv
2501.08316, which does not divide by s^2.

For fixed distributions the best discriminator is ``D = log p_real(x_t) - log p_student(x_t)``. If the distributions are
equal, it is 0 and the gradient of L_G vanishes, like that of DMD.

The head: at each chosen layer one learned query attends to all tokens (:func:`transformer.pooled_features`); a
two-layer network turns the pooled features into the logit.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from causvid_jax.config import DistillStageConfig, TransformerConfig
from causvid_jax.distill import dmd, scores
from causvid_jax.models import transformer
from causvid_jax.models.layers import gelu_tanh, linear
from causvid_jax.sharding.params import ParamSpec, linear_spec

HEAD = "gan_head"
"""Name of the discriminator's head among the fake score's parameters."""
Discriminator = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (x_t, timestep, prompt_embeds) -> logit [B]


def feature_layers(config: TransformerConfig, distill: DistillStageConfig) -> tuple[int, ...]:
    """Return the numbers of the layers whose features are read, from 0.

    They are ``gan_layers``; if that is empty, One-Forcing's 13, 21 and 29 of 30 layers, in proportion.
    """
    return distill.gan_layers or tuple(sorted({max(0, round(config.num_layers * i / 30) - 1) for i in (14, 22, 30)}))


def head_spec(config: TransformerConfig, distill: DistillStageConfig) -> dict[str, Any]:
    """Return the specification of the head: ``queries [layers, M]`` and two linear layers, the last zero at first."""
    layers, dim = len(feature_layers(config, distill)), config.dim
    return {
        "queries": ParamSpec((layers, dim), (None, None), nn.initializers.normal(1.0)),
        "fc1": linear_spec(layers * dim, dim, (None, "embed")),
        "fc2": linear_spec(dim, 1, ("embed", None), nn.initializers.zeros),
    }


def discriminator(
    params: Any,
    x: jax.Array,
    timestep: jax.Array,
    prompt_embeds: jax.Array,
    *,
    config: TransformerConfig,
    distill: DistillStageConfig,
) -> jax.Array:
    """Return the logit D, ``[B]``, that ``x`` is a noised real clip.

    Args:
        params: of the fake score, with :data:`HEAD`.
        x: noisy latents, ``[B, F, h, w, C]``.
        timestep: ``[B, F]``, in [0, 1000].
        prompt_embeds: ``[B, S, E]``.
        config: the fake score's network.
        distill: ``gan_layers``.
    """
    head, network = params[HEAD], {name: value for name, value in params.items() if name != HEAD}
    layers = jnp.asarray(feature_layers(config, distill))
    queries = jnp.zeros((config.num_layers, config.dim)).at[layers].set(head["queries"])
    pooled = transformer.pooled_features(network, x, timestep, prompt_embeds, queries, config=config)[layers]
    features = jnp.moveaxis(pooled, 0, 1).reshape(len(x), -1)
    return linear(head["fc2"], gelu_tanh(linear(head["fc1"], features)))[:, 0]


def generator_loss(
    x0: jax.Array,
    prompt_embeds: jax.Array,
    negative_prompt_embeds: jax.Array,
    key: jax.Array,
    *,
    discriminator: Discriminator,
    levels: scores.Levels = scores.Levels(),  # noqa: B008
    **options: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return L_G (module docstring) and the metrics of DMD with ``adversarial``, the mean of ``softplus(-D)``.

    ``discriminator`` is D. The other arguments are those of :func:`causvid_jax.distill.dmd.generator_loss`. ``mask``,
    ``timestep`` and ``noise`` apply to L_DMD only: D has one logit per clip and draws its own timesteps and noise.
    """
    loss, metrics = dmd.generator_loss(x0, prompt_embeds, negative_prompt_embeds, key, levels=levels, **options)
    diffusion, distill = options["diffusion"], options["distill"]
    x = x0.astype(jnp.float32)
    x_t, timestep, *_ = scores.noise_output(x, jax.random.fold_in(key, 1), None, None, diffusion, distill, levels)
    adversarial = jnp.mean(jax.nn.softplus(-discriminator(x_t, timestep, prompt_embeds)))
    total = loss + distill.gan_weight * adversarial
    return total, metrics | {"loss": total, "adversarial": adversarial}


def critic_loss(
    x0: jax.Array,
    real: jax.Array,
    prompt_embeds: jax.Array,
    key: jax.Array,
    *,
    discriminator: Discriminator,
    levels: scores.Levels = scores.Levels(),  # noqa: B008
    **options: Any,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return L_C (module docstring), and the metrics ``loss``, ``discriminator`` (its logistic loss), ``r1``, ``r2``.

    ``real`` are real latents of the same prompts, ``[B, F, h, w, C]``. The other arguments are those of
    :func:`causvid_jax.distill.dmd.critic_loss`; ``mask``, ``timestep`` and ``noise`` apply to L_flow only. The metrics
    ``r1`` and ``r2`` exist if their weights are not 0.
    """
    loss, metrics = dmd.critic_loss(x0, prompt_embeds, key, levels=levels, **options)
    diffusion, distill = options["diffusion"], options["distill"]
    fake = jax.lax.stop_gradient(x0.astype(jnp.float32))
    logits, slopes = [], {}
    for i, x, name, weight in ((1, fake, "r2", distill.gan_r2_weight), (2, real, "r1", distill.gan_r1_weight)):
        key_of = jax.random.fold_in(key, i)
        x_t, timestep, *_ = scores.noise_output(x, key_of, None, None, diffusion, distill, levels)
        logits.append(discriminator(x_t, timestep, prompt_embeds))
        if weight:
            moved = x_t + distill.gan_r_sigma * jax.random.normal(jax.random.fold_in(key, i + 2), x_t.shape)
            slope = (discriminator(moved, timestep, prompt_embeds) - logits[-1]) / distill.gan_r_sigma
            slopes[name] = jnp.mean(jnp.square(slope))
            loss = loss + weight * slopes[name]
    fake_logit, real_logit = logits
    logistic = jnp.mean(jax.nn.softplus(-real_logit) + jax.nn.softplus(fake_logit))
    total = loss + distill.gan_critic_weight * logistic
    return total, metrics | {"loss": total, "discriminator": logistic} | slopes
