import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from causvid_jax.cli import common
from causvid_jax.config import ConfigError
from causvid_jax.data import arrays, digits, generate, moving_digits, prepare
from tests.programs import free_port, write_recipe
from tests.refusals import refused
from tests.tiny import RECIPE, tiny_recipe, tiny_workdir


def test_data_stage_writes_the_clips_and_count_replaces_their_number(tmp_path):
    recipe = tiny_recipe(data={"train_clips": 4})
    assert "4 training and 2 test clips" in prepare.data(recipe, tmp_path)
    assert len(moving_digits.source(tmp_path / "data", recipe.data, recipe.video, "train")) == 4
    assert "6 training" in prepare.data(recipe, tmp_path, prepare.Options(count=6))
    # A reader needs no count: the dataset says how many clips it has.
    assert len(moving_digits.source(tmp_path / "data", recipe.data, recipe.video, "train")) == 6


def test_later_stages_name_what_is_missing(tmp_path):
    refused("no complete moving_digits dataset .*--stage=data", prepare.latents, RECIPE, tmp_path)
    prepare.data(RECIPE, tmp_path)
    refused("no trained vae.*--stage=vae", prepare.latents, RECIPE, tmp_path)
    refused("no trained teacher.*--stage=teacher", prepare.trajectories, RECIPE, tmp_path)


def with_weights(folder):
    """Fill ``folder`` with the weights of every stage of the tiny recipe, without datasets."""
    shutil.rmtree(tiny_workdir(folder) / "data")


def test_latents_and_trajectories_from_the_weights_of_their_stages(tmp_path):
    with_weights(tmp_path)
    prepare.data(RECIPE, tmp_path)
    assert "latents: 3 examples" in prepare.latents(RECIPE, tmp_path, prepare.Options(count=3))
    assert "trajectories: 5 examples" in prepare.trajectories(RECIPE, tmp_path, prepare.Options(count=5))
    latents, trajectories = (arrays.source(tmp_path / "data" / name) for name in ("latents", "trajectories"))
    assert latents[2]["latents"].shape == (3, 4, 4, 4) and trajectories[4]["trajectory"].shape == (3, 3, 4, 4, 4)
    assert trajectories[4]["caption"].decode() in digits.captions(RECIPE.data, "train")


def test_no_seed_serves_two_streams(tmp_path, monkeypatch):
    with_weights(tmp_path)
    seeds = []
    monkeypatch.setattr(generate, "write_streams", lambda *given, seed, **_: seeds.append((seed, len(given[3]))))
    recipe = tiny_recipe(train_taehv={"rollouts": ((1, 3), (2, 2))})
    for count, expected in ((0, [(0, 3), (3, 2)]), (5, [(0, 5), (5, 5)])):
        prepare.streams(recipe, tmp_path, prepare.Options(count=count))
        assert seeds[-2:] == expected


def test_prompts_of_a_file_replace_the_captions(tmp_path):
    listed = tmp_path / "prompts.txt"
    listed.write_text("a red 3\na blue 4\n")
    recipe = tiny_recipe(data={"prompt_file": str(listed)})
    assert prepare.prompts(recipe, tmp_path).endswith("prompts: 2 examples")
    assert prepare.prompts(recipe, tmp_path).endswith("was complete already, nothing to do: 2 examples")
    source = arrays.source(tmp_path / "data" / "prompts")
    assert [source[i]["caption"] for i in range(2)] == [b"a red 3", b"a blue 4"]
    assert source[0]["text"].shape == (3, RECIPE.text.dim)
    refused("no --prompts is given and data.prompt_file is empty", prepare.prompts, RECIPE, tmp_path)
    films = tiny_recipe(data={"name": "videos"})
    refused("no clips at .*--stage=data --videos=DIR", prepare.latents, films, tmp_path)
    refused("no --videos is given; --stage=data needs the folder", prepare.data, films, tmp_path)
    refused("no --videos is given", prepare.encode_videos, films, tmp_path)


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused("file/w cannot be made: Not a directory", common.writable_workdir, str(tmp_path / "file" / "w"))
    assert common.writable_workdir(str(tmp_path / "a" / "b")).is_dir()


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--stage is 'date'; accepted: data, latents, videos, prompts"):
        common.call("prepare", ["--config=digits", f"--workdir={tmp_path}", "--stage=date"])
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_processes_that_know_each_other_share_a_stage(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    with_weights(alone)
    shutil.copytree(alone, together)
    path = write_recipe(tmp_path, RECIPE)
    flags = [f"--config={path}", f"--workdir={together}", "--stage=trajectories", "--count=66"]
    flags += [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "launch.prepare", *flags, f"--process={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    # One of two shards each; one line for all.
    assert all("1/1" in error for _, error in said)
    assert "trajectories: 66 examples" in said[0][0] and "examples" not in said[1][0]

    assert "66 examples" in prepare.trajectories(RECIPE, alone, prepare.Options(count=66))
    one, many = (arrays.source(folder / "data" / "trajectories") for folder in (alone, together))
    for i in (0, 63, 64, 65):
        assert one[i]["caption"] == many[i]["caption"]
        np.testing.assert_allclose(many[i]["trajectory"], one[i]["trajectory"], atol=0.03)  # bfloat16
