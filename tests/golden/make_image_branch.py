"""Writes image_branch.npz: diffusers' image-to-video transformer with random weights. Needs the ``parity`` extra.

``python tests/golden/make_image_branch.py`` writes the file; ``--check`` draws new weights and inputs and compares the
JAX transformer with diffusers there and then. The file holds inputs and outputs, and the condition that diffusers'
image-to-video pipeline makes of a first and a last image with a random VAE; ``make_transformer`` draws the weights.
"""

import functools
import pathlib

import make_transformer
import numpy as np
import script

GOLDEN = pathlib.Path(__file__).with_name("image_branch.npz")
SEED = 6
# diffusers takes the last 512 rows of its context for text, whatever the model's sizes.
SIZES = {
    "dim": 40,
    "ffn_dim": 56,
    "num_heads": 2,
    "num_layers": 2,
    "in_channels": 10,  # 3 noisy, 4 mask, 3 image
    "out_channels": 3,
    "text_dim": 5,
    "text_length": 512,
    "image_dim": 14,
    "image_tokens": 11,
}


def reference(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(state dict, inputs and outputs, channels last) of diffusers."""
    rng = np.random.default_rng(seed)
    state, arrays = make_transformer.reference(seed, SIZES, (3, 4, 6), rng)
    return state, arrays | conditions(rng)


def conditions(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Condition channels of a video of 13 frames, channels last: its first, or first and last frame given."""
    import torch
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8).eval()
    pipeline = WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=None)
    first, last = (torch.from_numpy(rng.uniform(-1, 1, (1, 3, 16, 32)).astype(np.float32)) for _ in range(2))
    sizes = {"batch_size": 1, "height": 16, "width": 32, "num_frames": 13, "dtype": torch.float32, "device": "cpu"}
    with torch.no_grad():
        made = {
            "condition_first": pipeline.prepare_latents(first, **sizes)[1],
            "condition_both": pipeline.prepare_latents(first, **sizes, last_image=last)[1],
        }
    return {name: value.numpy().transpose(0, 2, 3, 4, 1) for name, value in made.items()}


error_of = functools.partial(script.velocity_error, SIZES)


def condition_errors(arrays: dict[str, np.ndarray]) -> list[float]:
    """Largest absolute difference of our condition channels from the recorded ones, given the same latents."""
    from causvid_jax.models.image_branch import image_condition

    pairs = (("condition_first", (0,)), ("condition_both", (0, 12)))
    return [
        float(np.abs(image_condition(arrays[name][..., 4:], known_frames=given) - arrays[name]).max())
        for name, given in pairs
    ]


def check(seed: int) -> None:
    """Compare with diffusers on new weights and inputs."""
    state, arrays = reference(seed)
    make_transformer.compare(f"image branch, seed {seed}", SIZES, state, arrays)
    assert condition_errors(arrays) == [0.0, 0.0], "the condition channels differ"


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(SEED)[1], check)
