"""The demo refuses what it cannot finish, and ends with a command that works."""

import shutil

import pytest

from causvid_jax.checkpoints import workdir
from causvid_jax.cli import common, demo
from causvid_jax.cli.options import parse
from causvid_jax.cli.sample import Options as SampleOptions
from causvid_jax.config.recipes import load_recipe
from causvid_jax.sampling import pipeline
from tests.refusals import refused


def test_weights_without_a_teacher_are_refused_before_the_stream(tmp_path, monkeypatch):
    (tmp_path / "run" / "distill").mkdir(parents=True)
    shutil.copy(workdir.ASSETS / "digits" / "distill.safetensors", tmp_path / "run" / "distill" / "weights.safetensors")
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: pytest.fail("loaded"))
    flags = [f"--workdir={tmp_path}/run", f"--output={tmp_path}/demo"]
    refused("holds no teacher; give a folder that has one", common.call, "demo", flags)


def test_its_last_line_samples_with_the_same_recipe_and_weights():
    own = demo.own_command(demo.Options(load_recipe("digits"), workdir="runs/digits"), "a red 3")
    flags = own.replace('"', "").split(" --")[1:]
    options = parse(SampleOptions, [f"--{flag}" for flag in flags])
    assert (options.config.name, options.checkpoint, options.prompt) == ("digits", "runs/digits", ("a red 3",))
    # The name of a variant's recipe is no value of --config.
    assert demo.own_command(demo.Options(load_recipe("digits:two")), "a red 3").startswith("sample --config=RECIPE --p")
