"""Wan2.1-T2V-14B: the recipe ``wan_1_3b`` with the large network as teacher and student.

``configs/wan_14b.py:i2v`` is Wan2.1-I2V-14B at 480p: the same network with the image branch, and the published sampler
(UniPC, 40 steps, shift 3) and negative prompt. It is sampled with ``--teacher --image``. Its student has the image
branch too (docs/training.md).
"""

import ml_collections

from causvid_jax.config import require

from . import wan_1_3b

SIZES = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
# Channels of noisy latents, mask and latents of the picture; width of CLIP's embeddings.
IMAGE = {"in_channels": 16 + 4 + 16, "image_dim": 1280}
GUIDANCE = 5.0
NEGATIVE_PROMPT_IMAGE = "镜头晃动，" + wan_1_3b.NEGATIVE_PROMPT
"""The published negative prompt of image to video, which also names a shaking camera."""


def get_config(variant: str = "t2v") -> ml_collections.ConfigDict:
    """Return the recipe of ``variant``, ``"t2v"`` or ``"i2v"``; raise a ConfigError for another."""
    require(variant in ("t2v", "i2v"), f"wan_14b has no variant {variant!r}; accepted: 't2v', 'i2v'")
    if variant == "t2v":
        return wan_1_3b.recipe("wan_14b", SIZES, GUIDANCE)
    config = wan_1_3b.recipe("wan_14b_i2v", SIZES | IMAGE, GUIDANCE)
    config.text.negative_prompt = NEGATIVE_PROMPT_IMAGE
    config.diffusion.update({"shift": 3.0, "num_inference_steps": 40, "solver": "unipc"})
    return config
