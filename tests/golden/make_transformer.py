"""Writes transformer.npz: diffusers' WanTransformer3DModel with random weights. Needs the ``parity`` extra.

``python tests/golden/make_transformer.py`` writes the file; ``--check`` draws new weights and inputs and compares the
JAX transformer with diffusers there and then. The file holds inputs and outputs; :func:`random_weights` draws the
weights again.
"""

import functools
import pathlib

import numpy as np
import script

GOLDEN = pathlib.Path(__file__).with_name("transformer.npz")
SEED = 5
# A head size of 12 leaves an uneven split of rotary pairs (2, 2, 2), one of 20 (4, 3, 3): take the uneven one.
SIZES = {
    "dim": 40,
    "ffn_dim": 56,
    "num_heads": 2,
    "num_layers": 3,
    "in_channels": 6,
    "out_channels": 6,
    "text_dim": 14,
    "text_length": 9,
}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Every parameter random, by name: kernels keep the variance, norm scales lie around 1, the rest around 0."""

    def spread(name, draw):
        if "norm" in name and name.endswith("weight"):
            return 1 + 0.2 * draw
        return draw / np.sqrt(np.prod(draw.shape[1:])) if name.endswith("weight") else 0.2 * draw

    return script.draw(shapes, seed, spread)


def reference(
    seed: int,
    sizes: dict[str, int] = SIZES,
    video: tuple[int, int, int] = (5, 6, 8),
    rng: np.random.Generator | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(state dict, inputs and output, channels last) of diffusers; ``rng`` draws the inputs."""
    import torch

    model = script.diffusers_transformer(sizes)
    state = random_weights(script.shapes_of(model), seed)
    script.load(model, state)
    rng = rng or np.random.default_rng(seed)
    x = rng.standard_normal((2, *video, sizes["in_channels"])).astype(np.float32)
    text = rng.standard_normal((2, sizes["text_length"], sizes["text_dim"])).astype(np.float32)
    arrays = {"x": x, "text": text, "timestep": np.array([987.5, 41.25], np.float32)}
    inputs = {
        "hidden_states": np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3)),
        "timestep": arrays["timestep"],
        "encoder_hidden_states": text,
    }
    if "image_dim" in sizes:
        image = rng.standard_normal((2, sizes["image_tokens"], sizes["image_dim"])).astype(np.float32)
        image[:, ::2] *= 0.01  # small enough for the epsilon of their norm to matter
        inputs["encoder_hidden_states_image"] = arrays["image"] = image
    with torch.no_grad():
        out = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}, return_dict=False)[0]
    return state, arrays | {"velocity": out.numpy().transpose(0, 2, 3, 4, 1)}


error_of = functools.partial(script.velocity_error, SIZES)


def compare(what: str, sizes: dict[str, int], state: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> None:
    """Compare live, and our original names with diffusers' own conversion of an original file."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from causvid_jax.config import TransformerConfig

    script.convert_and_compare(convert_wan_transformer_to_diffusers, state, TransformerConfig(**sizes))
    error = script.velocity_error(sizes, state, arrays)
    print(f"{what}: max |jax - diffusers| = {error:.1e}, std {arrays['velocity'].std():.2f}")
    assert error <= 5e-5


def check(seed: int) -> None:
    """Compare with diffusers on new weights and inputs."""
    compare(f"transformer, seed {seed}", SIZES, *reference(seed))


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(SEED)[1], check)
