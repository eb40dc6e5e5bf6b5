"""Wan2.1-T2V-1.3B: the published network as teacher, and the causal four-step student distilled from it.

480 x 832 pixels, 81 frames, latents [21, 60, 104, 16], 3 latent frames per block. Sizes are the published ones.
Learning rates, betas, batch sizes, update counts and the start of the EMA are Self-Forcing's, with one shift of 8 for
every network (Self-Forcing draws the timesteps of student and scores with 5). Teacher, VAE and students are published.
"""

import ml_collections

from causvid_jax.config import WAN_LATENT_MEAN, WAN_LATENT_STD, require

SIZES = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
GUIDANCE = 6.0
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""The published negative prompt of Wan2.1, CausVid and Self-Forcing."""

LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the recipe; ``"teacher_14b"`` has the 14B teacher and the 1.3B fake score of Self-Forcing.

    Raises:
        ConfigError: another variant.
    """
    require(variant in ("", "teacher_14b"), f"wan_1_3b has no variant {variant!r}; accepted: none, 'teacher_14b'")
    config = recipe("wan_1_3b", SIZES, GUIDANCE)
    if variant:
        config.name = "wan_1_3b_teacher_14b"
        config.teacher.update(LARGE)
        config.diffusion.guidance_scale = 5.0
        config.train_distill.critic_init = "student"
    return config


def recipe(name: str, sizes: dict[str, int], guidance: float) -> ml_collections.ConfigDict:
    """Return the recipe ``name`` of a Wan2.1 transformer of ``sizes``; ``guidance`` is ``diffusion.guidance_scale``."""
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
            "taehv": {"dtype": "bfloat16"},
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
                "optimizer": {**adamw, "b1": 0.0, "ema_decay": 0.99, "ema_start": 40},
                "critic_optimizer": {**adamw, "b1": 0.0, "learning_rate": 4e-7},
            },
        }
    )
