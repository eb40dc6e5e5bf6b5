"""Writes image_to_video.npz: diffusers' image-to-video pipeline with random weights. Needs the ``parity`` extra.

``python tests/golden/make_image_to_video.py`` writes the file; ``--check`` draws new weights and inputs and compares
the JAX sampler with diffusers there and then. The file holds a picture, noise, rows, the pipeline's condition and its
latents after every UniPC step; ``random_weights`` draws the weights again. The grid is recorded too, since diffusers'
begins elsewhere than the published one (as in ``make_unipc.py``).
"""

import pathlib

import make_transformer
import make_vae
import numpy as np
import script

GOLDEN = pathlib.Path(__file__).with_name("image_to_video.npz")
SEED = 9
STEPS, SHIFT, GUIDANCE = 4, 3.0, 5.0
VIDEO = {"height": 32, "width": 16, "frames": 9}
CODER = make_vae.SIZES
# diffusers takes the last 512 rows of its context for text, whatever the model's sizes.
TEACHER = {
    "dim": 24,
    "ffn_dim": 40,
    "num_heads": 2,
    "num_layers": 2,
    "in_channels": 12,  # 4 noisy, 4 mask, 4 image
    "out_channels": 4,
    "text_dim": 5,
    "text_length": 512,
    "image_dim": 14,
    "image_tokens": 5,
}


def recipe():
    """The recipe of these sizes."""
    from causvid_jax.config import from_config_dict

    return from_config_dict(
        {
            "name": "golden",
            "video": VIDEO,
            "text": {"kind": "umt5", "length": TEACHER["text_length"], "dim": TEACHER["text_dim"]},
            "umt5": {"dim": TEACHER["text_dim"]},
            "vae": CODER,
            "teacher": TEACHER,
            "student": TEACHER,
            "diffusion": {"shift": SHIFT, "num_inference_steps": STEPS, "solver": "unipc", "guidance_scale": GUIDANCE},
        }
    )


def weights(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Random state dicts in diffusers' names."""
    from causvid_jax.checkpoints.checkpoint import network_of

    config = recipe()
    return {
        "transformer": make_transformer.random_weights(
            network_of(config.teacher).shapes(config.teacher, "diffusers"), seed
        ),
        "vae": make_vae.random_weights(network_of(config.vae).shapes(config.vae, "diffusers"), seed),
    }


def reference(seed: int) -> dict[str, np.ndarray]:
    """Inputs and outputs, channels last, of diffusers."""
    import torch
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanImageToVideoPipeline,
    )

    model = script.diffusers_transformer(TEACHER)
    coder = AutoencoderKLWan(
        base_dim=CODER["base_dim"],
        z_dim=CODER["z_dim"],
        latents_mean=list(CODER["latent_mean"]),
        latents_std=list(CODER["latent_std"]),
    ).eval()
    for module, state in ((model, weights(seed)["transformer"]), (coder, weights(seed)["vae"])):
        script.load(module, state)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, num_train_timesteps=1000
    )
    pipeline = WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=coder, scheduler=scheduler, transformer=model
    )
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    picture = rng.uniform(-1, 1, (1, VIDEO["height"], VIDEO["width"], 3)).astype(np.float32)
    latent = (1, CODER["z_dim"], 1 + VIDEO["frames"] // 4, VIDEO["height"] // 8, VIDEO["width"] // 8)
    text, null = (np.zeros((1, TEACHER["text_length"], TEACHER["text_dim"]), np.float32) for _ in range(2))
    text[:, :7], null[:, :4] = draw(1, 7, TEACHER["text_dim"]), draw(1, 4, TEACHER["text_dim"])
    image, noise, steps = draw(1, TEACHER["image_tokens"], TEACHER["image_dim"]), draw(*latent), []
    sizes = {"height": VIDEO["height"], "width": VIDEO["width"], "num_frames": VIDEO["frames"]}
    pixels = torch.from_numpy(np.ascontiguousarray(picture.transpose(0, 3, 1, 2)))

    def remember(pipe, index, timestep, state):
        steps.append(state["latents"].numpy().transpose(0, 2, 3, 4, 1))
        return {}

    # The rows are random: there is no image encoder here, and the pipeline does not take them beside a picture.
    pipeline.encode_image = lambda *_: torch.from_numpy(image)
    with torch.no_grad():
        condition = pipeline.prepare_latents(
            pixels, batch_size=1, num_channels_latents=CODER["z_dim"], dtype=torch.float32, device="cpu", **sizes
        )[1]
        pipeline(
            image=(pixels + 1) / 2,
            prompt_embeds=torch.from_numpy(text),
            negative_prompt_embeds=torch.from_numpy(null),
            latents=torch.from_numpy(noise),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
            callback_on_step_end=remember,
            **sizes,
        )
    last = (0, 2, 3, 4, 1)
    arrays = {"picture": picture, "text": text, "null": null, "image": image, "noise": noise.transpose(last)}
    return arrays | {
        "condition": condition.numpy().transpose(last),
        "latents": np.stack(steps),
        "sigmas": scheduler.sigmas.numpy(),
    }


def errors_of(arrays: dict[str, np.ndarray], seed: int) -> tuple[float, float]:
    """Largest absolute differences of our condition and of our last latents from the recorded ones."""
    import jax

    from causvid_jax.checkpoints.checkpoint import load
    from causvid_jax.diffusion import solvers
    from causvid_jax.sampling import image_to_video
    from causvid_jax.sampling.teacher import guided_velocity

    config, states = recipe(), weights(seed)
    teacher = load(states["transformer"], config=config.teacher)[0]
    coder = load(states["vae"], config=config.vae)[0]
    condition = image_to_video.image_latents(coder, arrays["picture"], config=config)

    @jax.jit
    def sample(params, noise, condition):
        texts = arrays["text"], arrays["null"]
        guided = guided_velocity(params, *texts, arrays["image"], condition, config=config)
        return solvers.unipc(guided, noise, arrays["sigmas"], integer_timesteps=True)

    latents = sample(teacher, arrays["noise"], condition)
    pairs = (condition, arrays["condition"]), (latents, arrays["latents"][-1])
    return tuple(float(np.abs(a - b).max()) for a, b in pairs)


def check(seed: int) -> None:
    """Compare live."""
    arrays = reference(seed)
    condition, latents = errors_of(arrays, seed)
    std = arrays["latents"][-1].std()
    print(
        f"image to video: condition to {condition:.1e}, latents after {STEPS} steps to {latents:.1e} of std {std:.2f}"
    )
    assert condition <= 1e-4 and latents <= 5e-4


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(SEED), check)
