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


def reference(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(state dict, inputs and output, channels last) of diffusers."""
    import torch

    model = script.diffusers_transformer(SIZES)
    state = random_weights(script.shapes_of(model), seed)
    script.load(model, state)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 5, 6, 8, SIZES["in_channels"])).astype(np.float32)
    text = rng.standard_normal((2, SIZES["text_length"], SIZES["text_dim"])).astype(np.float32)
    timestep = np.array([987.5, 41.25], np.float32)
    with torch.no_grad():
        out = model(
            hidden_states=torch.from_numpy(np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3))),
            timestep=torch.from_numpy(timestep),
            encoder_hidden_states=torch.from_numpy(text),
            return_dict=False,
        )[0]
    return state, {"x": x, "text": text, "timestep": timestep, "velocity": out.numpy().transpose(0, 2, 3, 4, 1)}


error_of = functools.partial(script.velocity_error, SIZES)


def check(seed: int) -> None:
    """Compare live, and our original names with diffusers' own conversion of an original file."""
    import jax
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from causvid_jax.config import TransformerConfig

    jax.config.update("jax_default_matmul_precision", "highest")
    state, arrays = reference(seed)
    script.convert_and_compare(convert_wan_transformer_to_diffusers, state, TransformerConfig(**SIZES))
    error = error_of(state, arrays)
    print(f"transformer: max |jax - diffusers| = {error:.1e}, std {arrays['velocity'].std():.2f} (seed {seed})")
    assert error <= 5e-5


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(SEED)[1], check)
