"""Moving handwritten digits: all stages on two CPU cores. Every network is that of Wan2.1 at a small size.

Frames have 32 x 32 pixels. Frames of 64 x 64 have four times as many tokens and do not train in hours on a CPU. Digits
of 16 pixels (scans of MNIST, scaled down) move 1 pixel per frame: once around the frame in two seconds, 2.5 times in a
clip of 81 frames. So motion is visible, and every clip has a wrap-around.

``configs/digits.py:two`` has two digits of two colours in every clip, which may overlap. Its frames are twice as wide,
because on 32 x 32 pixels two digits of 16 overlap all the time, on 32 x 64 half of the time.

``configs/digits.py:quick`` takes the whole road in 54 minutes of processor time (46 minutes of two shared cores of an
AMD EPYC, 2026-11-30, with MNIST's handwriting as it is). It shows that every stage works, and not a good student:
shares of 0.15 of the frames with the right digit, 0.94 with the right colour and 0.23 of the frame pairs with the right
direction (64 held-out clips; the VAE has 20.5 dB).
"""

import ml_collections

COLORS = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")
VOCABULARY = (*"0123456789", *COLORS, "a", "and", "moving", "up", "down", "left", "right")
TEXT_LENGTH = 16


def in_turns(rounds: int, *stretches: tuple[int, int, int], start: int = 0) -> tuple[tuple[int, int, int], ...]:
    """Return a curriculum that repeats the ``stretches`` ``(steps, latent frames, clips)`` for ``rounds`` rounds.

    While a network trains on whole clips, its first blocks become worse, so the stretches must be short. The last
    stretch is the main part of the stage and not part of the curriculum. ``start`` is the step of the first round.

    Returns:
        ``(until_step, latent frames, batch_size)`` of each part, for ``StageConfig.curriculum``.
    """
    result, step = [], start
    for _ in range(rounds):
        for steps, frames, clips in stretches:
            step += steps
            result.append((step, frames, clips))
    return tuple(result[:-1])


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the recipe as an ``ml_collections.ConfigDict``.

    ``two``: clips of two digits. ``quick``: all stages in fewer steps, a test of the road.
    """
    changes = {"": lambda config: None, "two": two_digits, "quick": quick}
    if variant not in changes:
        raise ValueError(f"the variant is {variant!r}; accepted: none, 'two', 'quick'")
    config = one_digit()
    changes[variant](config)
    return config


def quick(config: ml_collections.ConfigDict) -> None:
    """Change the recipe to the same stages in fewer steps."""
    config.name = "digits_quick"
    config.data.update(train_clips=1024, test_clips=128)
    config.train_vae.update(
        steps=1000,
        batch_size=3,
        frames=21,
        # Images teach shapes, colours and first frames; clips teach motion.
        curriculum=((400, 1, 64), (750, 5, 12)),
        kl_weight=1e-6,
        # The loss of the first clips after the images is far higher; this is no error.
        bad_loss_factor=0.0,
    )
    config.train_vae.optimizer.update(kind="muon", learning_rate=2e-2, restarts=(), restart_factor=1.0)
    for stage in (config.train_teacher, config.train_causal, config.train_init):
        stage.optimizer.update(warmup_steps=50, ema_decay=0.98, ema_start=50)
    config.train_teacher.update(steps=600, batch_size=16, curriculum=in_turns(6, (60, 6, 48), (40, 0, 16)))
    turns = (20, 3, 96), (15, 9, 20), (15, 0, 8)
    config.train_causal.update(steps=200, batch_size=8, curriculum=in_turns(4, *turns))
    config.train_init.update(
        steps=200,
        batch_size=8,
        trajectories=64,
        extra_trajectories=((3, 1024), (9, 192)),
        curriculum=in_turns(4, *turns),
    )
    config.train_distill.update(steps=16, batch_size=8)
    config.train_taehv.update(steps=400, curriculum=((300, 17, 8),))
    for stage in (config.train_teacher, config.train_causal, config.train_init, config.train_distill):
        stage.update(sample_every=100000, save_every=50)
    config.train_distill.save_every = 8
    config.train_taehv.update(sample_every=200, save_every=100)


def two_digits(config: ml_collections.ConfigDict) -> None:
    """Change the recipe of one digit to that of two."""
    config.name = "two_digits"
    config.data.digits_per_clip = 2
    # There are hundreds of times more pairs of phrases than phrases.
    config.data.train_clips = 8192
    config.video.width = 64
    config.decoder = "vae"
    # The separator shows which colour belongs to which digit. Cross-attention alone would have to infer this.
    config.text.separator = "and"
    config.text.dim = config.teacher.text_dim = config.student.text_dim = 2 * len(VOCABULARY) + TEXT_LENGTH
    # A prompt switch resets the context here, so no stage trains on the context of other clips.
    for stage in (config.train_causal, config.train_init, config.train_distill):
        stage.prompt_switch_prob = 0.0


def one_digit() -> ml_collections.ConfigDict:
    """Return the recipe of one digit."""
    muon = {
        "kind": "muon",
        "learning_rate": 5e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "b2": 0.99,
        "clip_norm": 1.0,
    }
    network = {
        "dim": 192,
        "ffn_dim": 768,
        "num_heads": 4,
        "num_layers": 6,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": len(VOCABULARY) + TEXT_LENGTH,
        "text_length": TEXT_LENGTH,
        # 21 x 2 x 2 positions: with the base of 10000 most rotary pairs would hardly rotate.
        "rope_theta": 50.0,
        "dtype": "bfloat16",
        # On CPU storing activations for the backward pass takes longer than recomputing them (2x, measured).
        "remat": "full",
    }
    return ml_collections.ConfigDict(
        {
            "name": "digits",
            "video": {"height": 32, "width": 32, "frames": 81, "fps": 16},
            # "taehv" decodes a clip in a third of the time. It sometimes shows the wrong colour where only a piece of a
            # digit is in view (docs/research).
            "decoder": "vae",
            "text": {
                "kind": "words",
                "vocabulary": VOCABULARY,
                "length": TEXT_LENGTH,
                "dim": len(VOCABULARY) + TEXT_LENGTH,
            },
            "data": {
                "train_clips": 12288,
                "test_clips": 512,
                # Slanted or ambiguous scans make the teacher draw wrong 8s and 9s (docs/research).
                "handwriting": "upright",
                "digit_size": 16,
                "speed": 1,
                "colors": COLORS,
                "validation_fraction": 0.1,
            },
            "vae": {"base_dim": 8, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 1, "z_dim": 16},
            "teacher": network,
            "student": network,
            # A reset makes a cut. "recompute" makes none and shows a new prompt later (docs/research).
            "causal": {
                "frames_per_block": 3,
                # The first block stays in view, so that a stream keeps its digit. Sink and window are a whole clip.
                "window": 18,
                "sink": 3,
                "positions": "relative",
                # The keys and values of the last step serve later blocks: four passes a block instead of five. Errors
                # accumulate less than with a pass on the clean block (docs/research).
                "context_pass": False,
                "on_prompt_switch": "reset",
            },
            "diffusion": {
                "shift": 3.0,
                "num_inference_steps": 50,
                # A first block depends on nothing but noise and prompt, so it has more steps.
                "first_block_timesteps": ((1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0),),
                "solver": "euler",
                "guidance_scale": 6.0,
                # Guidance at low noise makes digits worse, and its parallel part makes strokes bold (docs/research).
                "guidance_interval": (400.0, 1000.0),
                "guidance_eta": 0.2,
            },
            "train_vae": {
                "steps": 16200,
                "batch_size": 2,
                "frames": 81,
                # (until step, frames, clips): images teach shapes and colours, and the first frame of a clip is one;
                # short clips teach motion, long clips constancy. The fifth part makes strokes sharp. Then the decoder
                # alone learns long histories, and short clips in turns with whole ones, for the second frame.
                "curriculum": (
                    *((1200, 1, 64), (3600, 5, 12), (5600, 21, 3), (6000, 81, 2), (9000, 21, 8), (10800, 81, 2)),
                    *in_turns(54, (50, 5, 32), (50, 81, 2), start=10800),
                ),
                "decoder_from": 9000,
                "kl_weight": 1e-6,
                # The loss of the first clips after the images is far higher; this is no error.
                "bad_loss_factor": 0.0,
                # With whole clips, latents of later frames could leave out the colour, because it does not change.
                "crop_frames": 4,
                "optimizer": {
                    "kind": "muon",
                    "learning_rate": 2e-2,
                    "warmup_steps": 100,
                    "schedule": "cosine",
                    "restarts": (9000, 10800),
                    "restart_factor": 0.25,
                    "b2": 0.99,
                    "clip_norm": 1.0,
                    "ema_decay": 0.99,
                    "ema_start": 100,
                },
                "sample_every": 500,
                "save_every": 100,
            },
            "taehv": {"z_dim": 16, "encoder_dim": 16, "decoder_dims": (128, 64, 16, 8), "blocks": 2},
            "train_taehv": {
                "steps": 4000,
                "batch_size": 2,
                # Images teach colours first. Whole clips come last, because late latents differ from the first ones.
                "curriculum": ((400, 1, 64), (3000, 17, 8)),
                "bad_loss_factor": 0.0,
                "optimizer": {
                    "kind": "muon",
                    "learning_rate": 3e-3,
                    "warmup_steps": 100,
                    "schedule": "cosine",
                    "b2": 0.99,
                    "clip_norm": 1.0,
                    "ema_decay": 0.99,
                    "ema_start": 100,
                },
                "sample_every": 500,
                "save_every": 250,
            },
            "train_teacher": {
                "steps": 12000,
                "batch_size": 32,
                # Whole clips teach motion. Short clips teach digit and colour and cost less.
                "curriculum": in_turns(86, (40, 3, 96), (40, 6, 64), (60, 0, 32)),
                "optimizer": {
                    "kind": "muon",
                    "learning_rate": 1e-2,
                    "warmup_steps": 100,
                    "schedule": "cosine",
                    "b2": 0.99,
                    "clip_norm": 1.0,
                    "ema_decay": 0.995,
                    "ema_start": 200,
                },
                "sample_every": 800,
                "samples": 32,
                "save_every": 100,
            },
            "train_causal": {
                "steps": 690,
                "batch_size": 32,
                # First blocks only (a seventh of a clip and the hardest part), prompt switches, whole clips.
                "curriculum": in_turns(6, (60, 3, 128), (40, 9, 48), (15, 0, 32)),
                "prompt_switch_prob": 0.25,
                "optimizer": {**muon, "ema_decay": 0.99, "ema_start": 100},
                "sample_every": 345,
                "samples": 32,
                "save_every": 115,
            },
            "train_init": {
                "teacher": "causal",
                "steps": 480,
                "batch_size": 16,
                "num_inference_steps": 24,
                "trajectories": 320,
                "extra_trajectories": ((3, 4608), (9, 960)),
                "curriculum": in_turns(10, (18, 3, 192), (18, 9, 48), (12, 0, 16)),
                "prompt_switch_prob": 0.3,
                "optimizer": {**muon, "ema_decay": 0.99, "ema_start": 100},
                "sample_every": 240,
                "samples": 32,
                "save_every": 96,
            },
            # Instead of train_init, with train_distill.init="consistency" (experiments/initialisation.py).
            "train_consistency": {
                "steps": 480,
                "batch_size": 16,
                "grid_steps": 24,
                "guidance_scale": 4.0,
                "tangent_warmup": 100,
                "curriculum": in_turns(10, (18, 3, 192), (18, 9, 48), (12, 0, 16)),
                "optimizer": {**muon, "ema_decay": 0.95},
                "sample_every": 120,
                "samples": 32,
                "save_every": 60,
            },
            "train_distill": {
                "steps": 680,
                "batch_size": 16,
                "rollout": "self",
                "critic_steps": 5,
                # With 3 instead of 6 strokes are blurred (docs/research).
                "guidance_scale": 6.0,
                "guidance_interval": (400.0, 1000.0),
                "guidance_eta": 0.2,
                # Rollouts that continue keep long streams right; the others train the first block.
                "continuation_prob": 0.7,
                "prompt_switch_prob": 0.3,
                "optimizer": {
                    "learning_rate": 1e-4,
                    "warmup_steps": 10,
                    "schedule": "cosine",
                    "restarts": (500,),
                    "b1": 0.0,
                    "clip_norm": 1.0,
                    "ema_decay": 0.98,
                },
                "critic_optimizer": {"learning_rate": 4e-4, "warmup_steps": 20, "b1": 0.0, "clip_norm": 1.0},
                "log_every": 10,
                "sample_every": 100,
                "samples": 32,
                "save_every": 20,
            },
        }
    )
