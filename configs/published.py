"""A recipe for every published model that ``causvid models`` lists, with the settings that its authors sample with.

``--config=published:self_forcing_dmd`` is Wan2.1's recipe with that student's steps, shift, blocks, window and sink.
Without ``--config``, ``causvid sample`` finds it by the name of the file that ``--student`` gives.
"""

import dataclasses

import ml_collections

from causvid_jax.config import WAN22_LATENT_MEAN, WAN22_LATENT_STD, WAN22_VAE, published, require

from . import wan_1_3b

VIDEO_5B = {"height": 704, "width": 1280, "fps": 24}
SIZES = {
    "1.3b": wan_1_3b.SIZES,
    "14b": wan_1_3b.LARGE,
    "5b": {
        "dim": 3072,
        "ffn_dim": 14336,
        "num_heads": 24,
        "num_layers": 30,
        "in_channels": 48,
        "out_channels": 48,
    },
}


def get_config(variant: str = "self_forcing_dmd") -> ml_collections.ConfigDict:
    """Return the recipe of the published model ``variant``.

    Raises:
        ConfigError: an unknown model, or one that this version cannot sample.
    """
    model = published.get(variant)
    require(model.readable, f"{model.what} cannot be sampled by this version: {model.not_known}")
    config = wan_1_3b.recipe(f"published:{variant}", SIZES[model.network], wan_1_3b.GUIDANCE)
    if model.network == "5b":
        config.video.update(VIDEO_5B)
        config.vae = dataclasses.asdict(WAN22_VAE) | {
            "latent_mean": WAN22_LATENT_MEAN,
            "latent_std": WAN22_LATENT_STD,
            "dtype": "bfloat16",
        }
    config.rolling_blocks = model.rolling_blocks
    for group, fields in model.settings.items():
        config[group] = {**config.get(group, {}), **fields}
    return config
