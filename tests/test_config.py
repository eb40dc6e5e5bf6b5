"""Configuration: every refusal is one sentence that names the value and what would be accepted."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import ml_collections
import numpy as np
import pytest

from causvid_jax import config as c
from causvid_jax.cli import train
from causvid_jax.config.recipes import load_recipe
from causvid_jax.sampling.request import SampleRequest
from tests.refusals import refused


def recipe(**groups):
    return {"name": "test", **groups}


def message(call, *args, **kwargs):
    with pytest.raises(c.ConfigError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_are_the_published_wan_1_3b():
    full = c.from_config_dict(recipe())
    assert (full.video.frames, full.video.latent_frames, full.video.fps) == (81, 21, 16)
    assert (full.student.dim, full.student.num_layers, full.student.head_dim) == (1536, 30, 128)
    assert full.causal.block_sizes(full.video.latent_frames) == (3,) * 7
    assert full.student == full.teacher


def test_configs_are_hashable_equal_by_value_and_frozen():
    a, b = c.from_config_dict(recipe()), c.from_config_dict(recipe())
    assert a is not b and hash(a) == hash(b) and a == b
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.video.height = 16


def test_config_dict_and_dict_give_the_same_recipe():
    values = recipe(
        video={"frames": 9}, causal={"frames_per_block": 1}, diffusion={"denoising_timesteps": [1000, 500.0]}
    )
    built = c.from_config_dict(values)
    assert built == c.from_config_dict(ml_collections.ConfigDict(values))
    assert built.video == c.VideoConfig(frames=9)
    assert built.diffusion.denoising_timesteps == (1000.0, 500.0)
    assert all(isinstance(s, float) for s in built.diffusion.denoising_timesteps)


def test_json_round_trip_is_exact():
    built = c.from_config_dict(
        recipe(
            diffusion={"shift": 0.1 + 0.2, "denoising_timesteps": (1000.0, 1e-3)},
            vae={"z_dim": 4, "latent_mean": (1 / 3,) * 4},
            teacher={"out_channels": 4, "in_channels": 4},
            student={"out_channels": 4, "in_channels": 4},
            train_distill={"optimizer": {"learning_rate": 2e-6}, "rollout": "data"},
        )
    )
    text = c.to_json(built)
    assert c.from_json(text) == built
    assert c.to_json(c.from_json(text)) == text
    assert json.loads(text)["train_distill"]["optimizer"]["learning_rate"] == 2e-6


@pytest.mark.parametrize(
    "groups,expected",
    [
        ({"vido": {}}, "config field 'vido' does not exist; did you mean 'video'?"),
        ({"video": {"frame": 9}}, "config field 'video.frame' does not exist; did you mean 'video.frames'?"),
        (
            {"train_init": {"optimizer": {"learning_rte": 1e-3}}},
            "config field 'train_init.optimizer.learning_rte' does not exist; did you mean "
            "'train_init.optimizer.learning_rate'?",
        ),
        ({"video": {"zzz": 1}}, "config field 'video.zzz' does not exist; accepted: height, width, frames, fps"),
        ({"video": {"frames": 9.0}}, "video.frames is 9.0; it must be of type int"),
        ({"video": {"frames": True}}, "video.frames is True; it must be of type int"),
        ({"video": {"frames": "9"}}, "video.frames is '9'; it must be of type int"),
        ({"causal": {"context_pass": 1}}, "causal.context_pass is 1; it must be of type bool"),
        ({"diffusion": {"shift": "8"}}, "diffusion.shift is '8'; it must be of type float"),
        ({"diffusion": {"shift": True}}, "diffusion.shift is True; it must be of type float"),
        ({"video": 3}, "video is 3; it must be a group of fields"),
        ({"vae": {"dim_mult": 3}}, "vae.dim_mult is 3; it must be a sequence"),
        ({"vae": {"dim_mult": (1, "x")}}, "vae.dim_mult[1] is 'x'; it must be of type int"),
        ({"teacher": {"patch_size": (1, 2)}}, "teacher.patch_size has 2 entries; it must have 3"),
    ],
)
def test_unknown_fields_and_wrong_types(groups, expected):
    assert message(c.from_config_dict, recipe(**groups)) == expected


@pytest.mark.parametrize(
    "cls,values,expected",
    [
        (c.VideoConfig, {"frames": 80}, "video.frames is 80; it must be 1 + 4n"),
        (c.VideoConfig, {"height": 40}, "video.height is 40; accepted: at least 16 and at most 8192, multiples of 16"),
        (c.TextConfig, {"kind": "clip"}, "text.kind is 'clip'; accepted: 'words', 'umt5'"),
        (
            c.TextConfig,
            {"kind": "words", "vocabulary": ("a", "b"), "length": 4, "dim": 5},
            "text.dim is 5; a word vocabulary needs len(vocabulary) + length = 6",
        ),
        (
            c.TextConfig,
            {"kind": "words", "vocabulary": ("a", "b"), "length": 4, "dim": 6, "separator": "b"},
            "text.dim is 6; a word vocabulary needs 2 len(vocabulary) + length = 8",
        ),
        (
            c.TextConfig,
            {"kind": "words", "vocabulary": ("a", "b"), "length": 4, "dim": 6, "separator": "and"},
            "text.separator is 'and'; accepted: none, or a word of text.vocabulary",
        ),
        (c.VAEConfig, {"temporal_downsample": (True,)}, "vae.temporal_downsample has 1 entries; dim_mult of length 4"),
        (c.VAEConfig, {"latent_std": (1.0,)}, "vae.latent_std has 1 entries; accepted: 0 or 16"),
        (c.TransformerConfig, {"num_heads": 7}, "transformer.dim is 1536, which 7 heads do not divide"),
        (c.TransformerConfig, {"dim": 36, "num_heads": 4}, "transformer head size is 9"),
        (c.TransformerConfig, {"dim": 16, "num_heads": 4}, "transformer head size is 4"),
        (c.TransformerConfig, {"patch_size": (2, 2, 2)}, "its temporal size must be 1"),
        (
            c.TransformerConfig,
            {"attention": "flash"},
            "transformer.attention is 'flash'; accepted: 'auto', 'xla', 'cudnn', 'splash', 'blockwise'",
        ),
        (c.TransformerConfig, {"dtype": "int8"}, "transformer.dtype is 'int8'; accepted: 'float32', 'bfloat16'"),
        (
            c.CausalConfig,
            {"window": 2},
            "causal.window is 2 frames; it must be 0 (no window) or at least one block (3)",
        ),
        (c.CausalConfig, {"positions": "rotary"}, "causal.positions is 'rotary'; accepted: 'absolute', 'relative'"),
        (c.DiffusionConfig, {"shift": 0.0}, "diffusion.shift is 0.0; accepted: above 0"),
        (c.DiffusionConfig, {"solver": "heun"}, "diffusion.solver is 'heun'; accepted: 'euler', 'unipc'"),
        (
            c.DiffusionConfig,
            {"denoising_timesteps": ()},
            "diffusion.denoising_timesteps is (); it must be a list of distinct values",
        ),
        (c.DiffusionConfig, {"denoising_timesteps": (4.0,)}, "that begins with 1000 (pure noise)"),
        (
            c.DiffusionConfig,
            {"first_block_timesteps": (1000.0, 500.0)},
            "first_block_timesteps[0] is 1000.0; it must be",
        ),
        (c.DiffusionConfig, {"first_block_timesteps": ((1000.0,), ())}, "first_block_timesteps[1] is (); it must be a"),
        (
            c.DiffusionConfig,
            {"first_block_timesteps": ((999.5, 500.0),)},
            "first_block_timesteps[0] begins with 999.5; accepted: 1000, as in denoising_timesteps",
        ),
        (
            c.DiffusionConfig,
            {"guidance_interval": (700.0, 700.0)},
            "diffusion.guidance_interval is (700, 700); accepted: the lowest and the highest timestep with guidance",
        ),
        (
            c.DistillStageConfig,
            {"guidance_interval": (9.0, 8.0)},
            "train_distill.guidance_interval is (9, 8); accepted",
        ),
        (c.DiffusionConfig, {"guidance_scale": float("nan")}, "diffusion.guidance_scale is nan; accepted: at least 0"),
        (c.VAEStageConfig, {"steps": 0}, "train_vae.steps is 0; accepted: at least 1 and at most 1000000000"),
        (c.StageConfig, {"curriculum": ((5, 0, 8), (5, 0, 4))}, "ends at steps [5, 5]; they must ascend"),
        (c.DiffusionConfig, {"denoising_timesteps": (500.0, 750.0)}, "in (0, 1000], descending"),
        (c.DiffusionConfig, {"denoising_timesteps": (1000.0, 0.0)}, "in (0, 1000], descending"),
        (c.OptimizerConfig, {"kind": "lion"}, "optimizer.kind is 'lion'; accepted: 'adamw', 'muon'"),
        (c.OptimizerConfig, {"schedule": "step"}, "optimizer.schedule is 'step'; accepted: 'constant', 'cosine'"),
        (c.OptimizerConfig, {"ema_decay": 1.0}, "optimizer.ema_decay is 1.0; accepted: at least 0 and below 1"),
        (c.DistillStageConfig, {"rollout": "both"}, "train_distill.rollout is 'both'; accepted: 'data', 'self'"),
        (
            c.DistillStageConfig,
            {"teacher": "big"},
            "train_distill.teacher is 'big'; accepted: 'bidirectional', 'causal', 'chunk'",
        ),
        (c.DistillStageConfig, {"init": "none"}, "train_distill.init is 'none'; accepted: 'ode', 'consistency'"),
        (
            c.DistillStageConfig,
            {"score_timestep_min": 990.0},
            "score_timestep_max are 990.0 and 980.0; accepted: 0 < min < max <= 1000",
        ),
    ],
)
def test_values_that_cannot_work(cls, values, expected):
    assert expected in message(cls, **values)


def test_block_sizes_cover_the_clip_exactly():
    for k in range(1, 6):
        for first in (False, True):
            causal = c.CausalConfig(frames_per_block=k, independent_first_frame=first)
            fitting = [f for f in range(1, 40) if (f - first) % k == 0 and f >= 1]
            for frames in range(1, 40):
                if frames in fitting:
                    sizes = causal.block_sizes(frames)
                    assert sum(sizes) == frames and set(sizes[first:]) <= {k} and (not first or sizes[0] == 1)
                else:
                    below = [f for f in fitting if f < frames]
                    above = [f for f in fitting if f > frames] or [fitting[-1] + k]
                    nearest = (below[-1], above[0]) if below else (above[0], above[0] + k)
                    text = message(causal.block_sizes, frames)
                    assert text.endswith(f"the nearest that do are {nearest[0]} and {nearest[1]}"), (k, first, frames)


def test_structures_are_named_in_the_refusal():
    text = message(c.CausalConfig(frames_per_block=4, independent_first_frame=True).block_sizes, 20)
    assert text == "20 latent frames do not fit blocks of 1 + n*4; the nearest that do are 17 and 21"
    text = message(c.CausalConfig(frames_per_block=3).block_sizes, 0)
    assert text == "0 latent frames do not fit blocks of n*3; the nearest that do are 3 and 6"


def test_only_the_stage_at_work_must_fit_the_mesh():
    """The published batches are 64 and 128; a mesh of 32 must not ask for other batches of the stages beside them."""
    recipe = c.Recipe(
        "r",
        train_distill=c.DistillStageConfig(batch_size=64, accumulate=2),
        train_vae=c.VAEStageConfig(batch_size=8, curriculum=((10, 5, 12),)),
        parallel=c.ParallelConfig(fsdp=32),
    )
    recipe.check_batch("distill")
    text = message(recipe.check_batch, "vae")
    assert text.startswith(
        "train_vae has a batch of 12; slices x data x fsdp x accumulate is 32, which does not divide"
    )
    assert text.endswith("it; the nearest that it divides are 32")
    refused("train_vae has a batch of 12", train.Options, config=recipe, stage="vae")
    assert train.Options(config=recipe, stage="distill").stage == "distill"


def test_clips_shorter_than_a_batch_needs_are_refused_before_anything_is_read():
    """The sentence came at the first batch of that stretch, which may be hours away."""
    stages = {
        "train_vae": c.VAEStageConfig(curriculum=((10, 21, 2),)),
        "train_causal": c.CausalStageConfig(curriculum=((10, 4, 2),)),
        "train_distill": c.DistillStageConfig(frames=6),  # its own rollouts may be longer than a clip
    }
    recipe = c.Recipe("r", video=c.VideoConfig(frames=9), **stages)
    for stage, expected in (
        ("vae", "clips of 21 frames (frames or curriculum); a clip has 9 (video.frames is 9)"),
        ("causal", "clips of 4 latent frames (frames or curriculum); a clip has 3 (video.frames is 9)"),
    ):
        assert message(recipe.check_stage, stage) == f"train_{stage} has {expected}"
    recipe.check_stage("distill")
    recipe.check_batch("vae")  # a search over meshes must not take this for a mesh that does not fit


@pytest.mark.parametrize(
    "changes,expected",
    [
        ({"student": {"out_channels": 8}}, "student.out_channels is 8; the VAE has 16 latent channels"),
        ({"teacher": {"text_length": 4}}, "teacher reads text of shape (4, 4096); the text encoder gives (512, 4096)"),
        (
            {"video": {"frames": 77}},
            "video.frames is 77: 20 latent frames do not fit blocks of n*3; the nearest that do are 18 and 21 (69 and "
            "81 frames)",
        ),
        ({"parallel": {"tensor": 8}}, "x context is 8, which does not divide them; the nearest that do are 6 and 12"),
        (
            {"parallel": {"context": 7, "ring": True}},
            "a latent frame has 1560 tokens for the teacher; parallel.context",
        ),
        (
            {"train_distill": {"continuation_prob": 0.5}},
            "train_distill.continuation_prob is 0.5; rollouts that continue",
        ),
        (
            {"train_init": {"extra_trajectories": ((3, 9),)}},
            "train_init.extra_trajectories is ((3, 9),), but the trajectories of a bidirectional",
        ),
        ({"train_init": {"curriculum": ((3, 6, 1),)}}, "train_init.frames or curriculum has a stretch of 6 latent"),
        ({"train_init": {"frames": 6}}, "train_init.frames or curriculum has a stretch of 6 latent frames"),
        ({"causal": {"sink": 2}}, "causal.sink is 2, which needs causal.window; use sink 0"),
        (
            {"train_init": {"prompt_switch_prob": 1.5}},
            "train_init.prompt_switch_prob is 1.5; accepted: at least 0 and at most 1",
        ),
        (
            {"train_vae": {"crop_frames": 3, "concat_clips": 2}},
            "train_vae.crop_frames is 3 and train_vae.concat_clips is 2; accepted: one of them",
        ),
        (
            {"train_vae": {"batch_size": 8, "accumulate": 4, "concat_clips": 3}},
            "train_vae.concat_clips is 3; accepted: 1 to the clips of the smallest batch that are processed together "
            "(batch / accumulate), 2",
        ),
        ({"train_taehv": {"noise": -0.1}}, "train_taehv.noise is -0.1; accepted: at least 0"),
        ({"train_taehv": {"rollouts": ((0, 4),)}}, "train_taehv.rollouts[0][0] is 0; accepted: at least 1"),
        ({"train_taehv": {"rollouts": ((2, 4), (2, 1))}}, "train_taehv.rollouts names a length twice"),
    ],
)
def test_recipes_that_cannot_work(changes, expected):
    assert expected in message(c.from_config_dict, recipe(**changes))


@pytest.mark.parametrize(
    "steps,expected",
    [
        (100, ((10, 5, 4), (20, 9, 2), (100, 0, 8))),
        (20, ((10, 5, 4), (20, 9, 2))),
        (15, ((10, 5, 4), (15, 9, 2))),
        (6, ((6, 5, 4),)),
    ],
)
def test_a_shortened_stage_ends_within_its_curriculum(steps, expected):
    assert c.StageConfig(steps=steps, curriculum=((10, 5, 4), (20, 9, 2))).stretches == expected


def test_old_names_are_refused_with_the_new_one():
    expected = "config field 'train_distill.guidance' was renamed; write 'train_distill.guidance_scale'"
    assert message(c.from_config_dict, recipe(train_distill={"guidance": 3.0})) == expected
    assert message(c.check_field, "train_distill.guidance") == expected
    assert message(c.check_field, "video.size.x") == (
        "config field 'video.size.x' does not exist; accepted: height, width, frames, fps"
    )


def test_config_and_recipes_import_no_jax():
    code = (
        "import sys, configs.digits, configs.wan_14b as w, causvid_jax.config as c; c.from_config_dict(w.get_config())"
    )
    code += "; print(sorted({'jax', 'flax', 'numpy', 'tensorflow_datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_request_in_python_is_checked_like_flags():
    """A text was read as a sequence of letters, and strengths above 1 or NaN were accepted."""
    digits = load_recipe(pathlib.Path(__file__).parents[1] / "configs" / "digits.py")
    given = {"config": digits, "prompt": ("a red 3 moving left",), "video": "a.mp4"}
    SampleRequest(**given, strength=1, seed=np.int64(3))
    for change, words in (
        ({"prompt": "a red 3 moving left"}, "--prompt is 'a red .*; it must be a sequence"),
        ({"strength": float("nan")}, "--strength is nan; accepted: at least 0"),
        ({"strength": 2.0}, "--strength is 2.0"),
        ({"frames": 10.5}, "--frames is 10.5; it must be of type int"),
        ({"seed": "1"}, "--seed is '1'"),
        ({"config": "digits"}, "config is 'digits'; give a recipe"),
    ):
        refused(words, SampleRequest, **given | change)
