"""Wan2.1-T2V-14B: as ``wan_1_3b``, with the large network as teacher and student."""

import ml_collections

from configs import wan_1_3b

SIZES = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
GUIDANCE = 5.0


def get_config() -> ml_collections.ConfigDict:
    """The recipe as an ``ml_collections.ConfigDict``."""
    return wan_1_3b.recipe("wan_14b", SIZES, GUIDANCE)
