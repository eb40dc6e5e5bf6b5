import subprocess
import sys

import jax
import numpy as np
import pytest

from causvid_jax.config import ConfigError, DataConfig, from_config_dict
from causvid_jax.data import arrays, digits, moving_digits
from causvid_jax.models import transformer, vae
from causvid_jax.weights import stages, store
from launch import common, prepare

SMALL = {
    "name": "small",
    "video": {"height": 16, "width": 16, "frames": 9},
    "data": {"train_clips": 4, "test_clips": 2, "digit_size": 8},
}


def test_data_stage_writes_the_clips_and_count_replaces_their_number(tmp_path):
    recipe = from_config_dict(SMALL)
    assert "4 training and 2 test clips" in prepare.data(recipe, tmp_path, 0)
    assert len(moving_digits.source(tmp_path / "data", recipe.data, recipe.video, "train")) == 4
    assert "6 training" in prepare.data(recipe, tmp_path, 6)
    # A reader needs no count: the dataset says how many clips it has.
    assert len(moving_digits.source(tmp_path / "data", recipe.data, recipe.video, "train")) == 6


def test_later_stages_name_what_is_missing(tmp_path):
    recipe = from_config_dict(SMALL)
    with pytest.raises(ConfigError, match="no complete moving_digits dataset .*--stage=data"):
        prepare.latents(recipe, tmp_path, 0)
    prepare.data(recipe, tmp_path, 0)
    with pytest.raises(ConfigError, match="no trained vae.*--stage=vae"):
        prepare.latents(recipe, tmp_path, 0)
    with pytest.raises(ConfigError, match="no trained teacher.*--stage=teacher"):
        prepare.trajectories(recipe, tmp_path, 0)


def test_latents_and_trajectories_from_the_weights_of_their_stages(tmp_path):
    words = digits.vocabulary(DataConfig())
    net = {"dim": 16, "ffn_dim": 16, "num_heads": 2, "num_layers": 1, "in_channels": 4, "out_channels": 4}
    net |= {"text_length": 8, "text_dim": len(words) + 8, "freq_dim": 8}
    recipe = from_config_dict(
        SMALL
        | {
            "text": {"kind": "words", "vocabulary": words, "length": 8, "dim": len(words) + 8},
            "vae": {
                "base_dim": 2,
                "dim_mult": (1, 1, 1),
                "temporal_downsample": (True, True),
                "num_res_blocks": 1,
                "z_dim": 4,
            },
            "teacher": net,
            "student": net,
            "diffusion": {"teacher_steps": 4},
        }
    )
    for stage, tree, metadata in (
        ("vae", vae.abstract(recipe.vae), stages.vae_metadata(recipe.vae)),
        ("teacher", transformer.abstract(recipe.teacher), {}),
    ):
        store.save_params(
            stages.stage_path(tmp_path, stage), jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), tree), metadata
        )
    prepare.data(recipe, tmp_path, 0)
    assert "latents: 3 examples" in prepare.latents(recipe, tmp_path, 3)
    assert "trajectories: 5 examples" in prepare.trajectories(recipe, tmp_path, 5)
    latents, trajectories = (arrays.source(tmp_path / "data" / name) for name in ("latents", "trajectories"))
    assert latents[2]["latents"].shape == (3, 4, 4, 4) and trajectories[4]["trajectory"].shape == (5, 3, 4, 4, 4)
    assert not digits.is_held_out(trajectories[4]["caption"].decode(), recipe.data)


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/w cannot be made: Not a directory"):
        common.writable_workdir(str(tmp_path / "file" / "w"))
    assert common.writable_workdir(str(tmp_path / "a" / "b")).is_dir()


def test_an_unknown_stage_ends_with_status_2_and_one_sentence(tmp_path):
    config = tmp_path / "small.py"
    config.write_text(f"def get_config():\n    return {SMALL!r}\n")
    done = subprocess.run(
        [sys.executable, "-m", "launch.prepare", f"--config={config}", f"--workdir={tmp_path}", "--stage=date"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "error: --stage is 'date'; accepted: data, latents, prompts, trajectories, assets"
    )
    assert not (tmp_path / "data").exists()
