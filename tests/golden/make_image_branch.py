"""Writes image_branch.npz: diffusers' image-to-video transformer with random weights. Needs the ``parity`` extra.

``python tests/golden/make_image_branch.py`` writes the file; ``--check`` draws new weights and inputs and compares the
JAX transformer with diffusers there and then. The file holds inputs and outputs, and the condition that diffusers'
image-to-video pipeline makes of a first and a last image with a random VAE; ``random_weights`` draws the weights again.
"""

import functools
import pathlib

import numpy as np
import script
from make_transformer import random_weights

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
    import torch

    model = script.diffusers_transformer(SIZES)
    state = random_weights(script.shapes_of(model), seed)
    script.load(model, state)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, 4, 6, SIZES["in_channels"])).astype(np.float32)
    text = rng.standard_normal((2, SIZES["text_length"], SIZES["text_dim"])).astype(np.float32)
    image = rng.standard_normal((2, SIZES["image_tokens"], SIZES["image_dim"])).astype(np.float32)
    image[:, ::2] *= 0.01  # small enough for the epsilon of their norm to matter
    timestep = np.array([987.5, 41.25], np.float32)
    with torch.no_grad():
        out = model(
            hidden_states=torch.from_numpy(np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3))),
            timestep=torch.from_numpy(timestep),
            encoder_hidden_states=torch.from_numpy(text),
            encoder_hidden_states_image=torch.from_numpy(image),
            return_dict=False,
        )[0]
    arrays = {"x": x, "text": text, "image": image, "timestep": timestep}
    return state, arrays | {"velocity": out.numpy().transpose(0, 2, 3, 4, 1)} | conditions(rng)


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
    """Compare live, and our original names with diffusers' own conversion of an original file."""
    import jax
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from causvid_jax.config import TransformerConfig

    jax.config.update("jax_default_matmul_precision", "highest")
    state, arrays = reference(seed)
    script.convert_and_compare(convert_wan_transformer_to_diffusers, state, TransformerConfig(**SIZES))
    error = error_of(state, arrays)
    print(f"image branch: max |jax - diffusers| = {error:.1e}, std {arrays['velocity'].std():.2f} (seed {seed})")
    assert error <= 5e-5
    assert condition_errors(arrays) == [0.0, 0.0], "the condition channels differ"


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(SEED)[1], check)
