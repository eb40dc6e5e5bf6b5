"""Writes vae.npz: diffusers' AutoencoderKLWan with random weights. Needs the ``parity`` extra.

``python tests/golden/make_vae.py`` writes the file; ``--check`` draws new weights and inputs and compares the JAX VAE
with diffusers there and then. The file holds inputs and outputs; :func:`random_weights` draws the weights again.
"""

import pathlib

import numpy as np
import script

GOLDEN = pathlib.Path(__file__).with_name("vae.npz")
SEED = 3
SIZES = {
    "base_dim": 8,
    "z_dim": 4,
    "latent_mean": (0.1, -0.2, 0.3, 0.05),
    "latent_std": (0.5, 1.5, 0.8, 1.1),
}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Every parameter random, by name: kernels keep the variance, gammas lie around 1, biases around 0."""

    def spread(name, draw):
        if name.endswith("weight"):
            return draw / np.sqrt(np.prod(draw.shape[1:]))
        return 1 + 0.2 * draw if name.endswith("gamma") else 0.2 * draw if name.endswith("bias") else draw

    return script.draw(shapes, seed, spread)


def reference(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(state dict, inputs and outputs, channels last) of diffusers."""
    import torch
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(base_dim=SIZES["base_dim"], z_dim=SIZES["z_dim"]).eval()
    state = random_weights(script.shapes_of(model), seed)
    script.load(model, state)
    rng = np.random.default_rng(seed)
    video = rng.uniform(-1, 1, (1, 13, 32, 24, 3)).astype(np.float32)
    latents = rng.standard_normal((1, 4, 4, 3, 4)).astype(np.float32)
    first, last = (0, 4, 1, 2, 3), (0, 2, 3, 4, 1)
    with torch.no_grad():
        mean, logvar = model._encode(torch.from_numpy(video.transpose(first))).chunk(2, dim=1)
        raw = latents * np.float32(SIZES["latent_std"]) + np.float32(SIZES["latent_mean"])
        decoded = model.decode(torch.from_numpy(np.ascontiguousarray(raw.transpose(first)))).sample
    arrays = {"mean": mean, "logvar": logvar, "decoded": decoded}
    return state, {"video": video, "latents": latents} | {k: v.numpy().transpose(last) for k, v in arrays.items()}


def check(seed: int) -> None:
    """Compare live: both directions, and our original names through diffusers' own conversion of the original file."""
    import jax
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    from causvid_jax.config import VAEConfig
    from causvid_jax.models import vae

    config = VAEConfig(**SIZES)
    state, expected = reference(seed)
    params = script.convert_and_compare(convert_wan_vae_to_diffusers, state, config)
    mean, logvar = jax.jit(lambda p, v: vae.encode_moments(p, v, config=config))(params, expected["video"])
    decoded = jax.jit(lambda p, z: vae.decode(p, z, config=config))(params, expected["latents"])
    for name, value in {"mean": mean, "logvar": logvar, "decoded": decoded}.items():
        error, scale = np.abs(value - expected[name]).max(), expected[name].std()
        print(f"vae {name}: max |jax - diffusers| = {error:.1e}, std {scale:.2f} (seed {seed})")
        assert value.shape == expected[name].shape and error <= 1e-4, name


def written() -> dict[str, np.ndarray]:
    state, arrays = reference(SEED)
    return {"names": np.array(sorted(state))} | arrays


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, written, check)
