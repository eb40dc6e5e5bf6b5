"""Map pixel frames of a stream to its blocks and back, and check their size. Imports no JAX.

Frames and blocks are counted from 0. With a time factor of 4, latent frame 0 is frame 0, and latent frame i is frames
4 i - 3 to 4 i. Blocks have K latent frames (``causal.frames_per_block``); an independent first frame is block 0.
"""

import numpy as np

from causvid_jax.config import Recipe, require


def covering_latents(frames: int, config: Recipe) -> int:
    """Return the number of latent frames of the fewest blocks that hold ``frames`` pixel frames.

    Raises:
        ConfigError: fewer than one frame.
    """
    require(frames >= 1, f"frames is {frames}; a stream has at least 1")
    return _latents_through(block_of(frames - 1, config), config)


def block_of(frame: int, config: Recipe) -> int:
    """Return the block that holds pixel frame ``frame``."""
    latent = -(-frame // _time_factor(config))  # frame 0 is latent 0 alone, 1..4 are latent 1, ...
    size = config.causal.frames_per_block
    if config.causal.independent_first_frame and latent:
        return 1 + (latent - 1) // size
    return latent // size


def first_frame(block: int, config: Recipe) -> int:
    """Return the first pixel frame of a block."""
    latents = _latents_through(block - 1, config)
    return 1 + _time_factor(config) * (latents - 1) if latents else 0


def check_pixels(pixels: np.ndarray, config: Recipe, axes: int = 3) -> None:
    """Refuse pixels that are not ``[..., H, W, 3]`` of the recipe's size with at least ``axes`` axes."""
    size = [config.video.height, config.video.width, 3]
    require(
        pixels.ndim >= axes and list(pixels.shape[-3:]) == size,
        f"the pixels have the shape {list(pixels.shape)}; it must have at least {axes} axes and end in {size}, the "
        "size of the recipe's video",
    )


def _time_factor(config: Recipe) -> int:
    return 2 ** sum(config.vae.temporal_downsample)


def _latents_through(block: int, config: Recipe) -> int:
    """Return the number of latent frames in blocks 0 to ``block`` together."""
    if config.causal.independent_first_frame:
        return 1 + block * config.causal.frames_per_block if block >= 0 else 0
    return (block + 1) * config.causal.frames_per_block
