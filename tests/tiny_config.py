"""The smallest recipe that has every stage; a config file like those of ``configs/``, for tests."""

import ml_collections

COLORS = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")
VOCABULARY = (*"0123456789", *COLORS, "a", "and", "moving", "up", "down", "left", "right")
LENGTH = 8
TEXT_DIM = len(VOCABULARY) + LENGTH


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe: clips of 9 frames of 16 x 16 pixels, one layer, two denoising steps."""
    network = {
        "dim": 16,
        "ffn_dim": 16,
        "num_heads": 2,
        "num_layers": 1,
        "in_channels": 4,
        "out_channels": 4,
        "text_length": LENGTH,
        "text_dim": TEXT_DIM,
        "freq_dim": 8,
    }
    train = {
        "steps": 5,
        "batch_size": 2,
        "log_every": 1,
        "sample_every": 100,
        "samples": 2,
        "save_every": 2,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "ema_decay": 0.9},
    }
    return ml_collections.ConfigDict(
        {
            "name": "tiny",
            "video": {"height": 16, "width": 16, "frames": 9},
            "data": {"train_clips": 6, "test_clips": 2, "digit_size": 8},
            "text": {"kind": "words", "vocabulary": VOCABULARY, "length": LENGTH, "dim": TEXT_DIM},
            "vae": {
                "base_dim": 2,
                "dim_mult": (1, 1, 1),
                "temporal_downsample": (True, True),
                "num_res_blocks": 1,
                "z_dim": 4,
            },
            "taehv": {
                "z_dim": 4,
                "encoder_dim": 8,
                "decoder_dims": (8, 8, 8),
                "blocks": 1,
                "temporal_downsample": (True, True),
                "temporal_upsample": (True, True),
            },
            "teacher": network,
            "student": network,
            "causal": {"frames_per_block": 1, "window": 2},
            "diffusion": {"shift": 3.0, "num_inference_steps": 2, "denoising_timesteps": (1000.0, 500.0)},
            "train_vae": {**train, "frames": 9, "curriculum": ((3, 5, 3),)},
            "train_taehv": train,
            "train_teacher": train,
            "train_causal": {**train, "prompt_switch_prob": 0.5},
            "train_init": {**train, "trajectories": 4},
            "train_consistency": train,
            "train_distill": {**train, "critic_steps": 2},
        }
    )
