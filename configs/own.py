"""A recipe for your own videos: copy this file, change the marked lines, and train every stage on your clips.

::

    causvid prepare --config=configs/own.py --workdir=DIR --stage=data --videos=FOLDER --captions=captions.csv
    causvid train   --config=configs/own.py --workdir=DIR --stage=vae
    causvid prepare --config=configs/own.py --workdir=DIR --stage=latents
    causvid train   --config=configs/own.py --workdir=DIR --stage=teacher
    causvid prepare --config=configs/own.py --workdir=DIR --stage=trajectories
    causvid train   --config=configs/own.py --workdir=DIR --stage=init
    causvid train   --config=configs/own.py --workdir=DIR --stage=distill
    causvid sample  --config=configs/own.py --checkpoint=DIR --prompt="..."

``captions.csv`` has the columns ``file`` and ``caption``. ``configs/own.py`` reads captions of the closed vocabulary
below, which needs no text encoder. ``configs/own.py:umt5`` reads captions of any words with the published UMT5 encoder
in ``DIR/text_encoder``.
"""

import ml_collections

from causvid_jax.config import require

# Change: every word of your captions; case and punctuation are ignored.
VOCABULARY = ("a", "the", "red", "green", "blue", "car", "ball", "moves", "left", "right")
# Change: the most words of a caption.
LENGTH = 16
# Change: size and length of a clip; sides are multiples of 16, frames are 9 + 12 n (whole blocks of the student).
VIDEO = {"height": 64, "width": 64, "frames": 33, "fps": 16.0}


def get_config(variant: str = "words") -> ml_collections.ConfigDict:
    """Return the recipe; ``variant`` is ``"words"`` (the vocabulary above) or ``"umt5"`` (captions of any words).

    Raises:
        ConfigError: another variant.
    """
    require(variant in ("words", "umt5"), f"own has no variant {variant!r}; accepted: 'words', 'umt5'")
    text = {"kind": "words", "vocabulary": VOCABULARY, "length": LENGTH, "dim": len(VOCABULARY) + LENGTH}
    if variant == "umt5":
        text = {"kind": "umt5", "length": 512, "dim": 4096}
    network = {
        "dim": 256,
        "ffn_dim": 1024,
        "num_heads": 4,
        "num_layers": 8,
        "text_dim": text["dim"],
        "text_length": text["length"],
        "dtype": "bfloat16",
        "remat": "full",
    }
    optimizer = {"learning_rate": 4e-4, "warmup_steps": 100, "schedule": "cosine", "clip_norm": 1.0, "ema_decay": 0.99}
    return ml_collections.ConfigDict(
        {
            "name": f"own_{variant}",
            "video": VIDEO,
            "text": text,
            "data": {"name": "videos"},
            "vae": {"base_dim": 16, "num_res_blocks": 1},
            "teacher": network,
            "student": network,
            "causal": {"frames_per_block": 3, "window": 6},
            "diffusion": {"shift": 3.0, "num_inference_steps": 50, "guidance_scale": 4.0},
            "train_vae": {
                "steps": 10000,
                "batch_size": 2,
                "frames": min(33, VIDEO["frames"]),
                # (until step, frames, clips): short clips teach the pixels at a fraction of the cost.
                "curriculum": ((4000, 5, 8), (7000, min(17, VIDEO["frames"]), 4)),
                "optimizer": {**optimizer, "learning_rate": 2e-3},
            },
            "train_taehv": {"steps": 6000, "batch_size": 4, "optimizer": {**optimizer, "learning_rate": 1.5e-3}},
            "train_teacher": {"steps": 10000, "batch_size": 16, "optimizer": optimizer},
            "train_init": {"steps": 2000, "batch_size": 8, "trajectories": 512, "optimizer": optimizer},
            "train_distill": {
                "steps": 200,
                "batch_size": 8,
                "guidance_scale": 3.0,
                "optimizer": {**optimizer, "learning_rate": 2e-5, "schedule": "constant", "b1": 0.0},
                "critic_optimizer": {"learning_rate": 1e-4, "warmup_steps": 20, "b1": 0.0, "clip_norm": 1.0},
            },
        }
    )
