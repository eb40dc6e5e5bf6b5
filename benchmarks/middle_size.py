"""A recipe between the digits and Wan 1.3B: width 512, 8 layers, latents of 30 x 52, nine latent frames in view.

On a CPU a block takes seconds, most of them in products of matrices and in attention. So it shows how fast XLA's
kernels are; the digits show overheads. The weights are random: ``python benchmarks/compare_torch.py
--config=benchmarks/middle_size.py --output=compare.json``.
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe of the digits at this size, with the paper's sampler of four steps and a cache write."""
    config = digits.get_config()
    config.name = "middle_size"
    config.video.update(height=240, width=416)
    for network in (config.teacher, config.student):
        network.update(dim=512, ffn_dim=2048, num_heads=8, num_layers=8)
    config.causal.update(window=9, sink=0, context_pass=True)
    config.diffusion.first_block_timesteps = ()
    return config
