"""Wan2.1-T2V-1.3B: the published network as teacher, and the causal four-step student distilled from it.

480 x 832 pixels, 81 frames, latents [21, 60, 104, 16], 3 latent frames a block. Sizes are the published ones; rates,
betas, batch and update counts are Self-Forcing's, on one shift of 8 for every network (Self-Forcing trains its student
on 5 beside a teacher on 8). ``launch.convert`` brings the teacher, the VAE and published students.
"""

import ml_collections

from causvid_jax.models.vae import WAN_LATENT_MEAN, WAN_LATENT_STD
from causvid_jax.text.tokenizer import NEGATIVE_PROMPT

SIZES = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
GUIDANCE = 6.0

LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe as an ``ml_collections.ConfigDict``; ``teacher_14b``: judged by the 14B network, as Self-Forcing's is,
    beside a fake score of the student's size."""
    if variant not in ("", "teacher_14b"):
        raise ValueError(f"the variant is {variant!r}; accepted: none, 'teacher_14b'")
    config = recipe("wan_1_3b", SIZES, GUIDANCE)
    if variant:
        config.name = "wan_1_3b_teacher_14b"
        config.teacher.update(LARGE)
        config.diffusion.guidance_scale = 5.0
        config.train_distill.critic_init = "student"
    return config


def recipe(name: str, sizes: dict[str, int], guidance: float) -> ml_collections.ConfigDict:
    """The recipe of a Wan2.1 transformer of ``sizes``; ``guidance`` is the teacher's when it samples."""
    network = {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": (1, 2, 2),
        "text_dim": 4096,
        "text_length": 512,
        "freq_dim": 256,
        "dtype": "bfloat16",
        "attention": "auto",
        "remat": "full",
        **sizes,
    }
    # Published rates; b1 = 0 and the critic's smaller rate are Self-Forcing's.
    adamw = {"learning_rate": 2e-6, "warmup_steps": 0, "weight_decay": 0.01, "clip_norm": 10.0}
    return ml_collections.ConfigDict(
        {
            "name": name,
            "video": {"height": 480, "width": 832, "frames": 81, "fps": 16},
            "text": {"kind": "umt5", "length": 512, "dim": 4096, "negative_prompt": NEGATIVE_PROMPT},
            "data": {"name": "videos"},
            "vae": {"latent_mean": WAN_LATENT_MEAN, "latent_std": WAN_LATENT_STD, "dtype": "bfloat16"},
            "teacher": dict(network),
            "student": dict(network),
            "causal": {"frames_per_block": 3},
            "diffusion": {
                "shift": 8.0,
                "num_inference_steps": 50,
                "solver": "euler",
                "guidance_scale": guidance,
                "denoising_timesteps": (1000.0, 750.0, 500.0, 250.0),
            },
            "train_init": {"steps": 3000, "batch_size": 128, "trajectories": 1500, "optimizer": adamw},
            "train_distill": {
                "steps": 120,
                "batch_size": 64,
                "rollout": "self",
                "critic_steps": 5,
                "guidance_scale": 4.0,
                "optimizer": {**adamw, "b1": 0.0, "ema_decay": 0.99},
                "critic_optimizer": {**adamw, "b1": 0.0, "learning_rate": 4e-7},
            },
        }
    )
