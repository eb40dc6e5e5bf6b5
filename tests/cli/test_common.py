"""The launchers' front door, as a process: what is accepted, the one sentence for what is not, the exit status."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from causvid_jax.cli import common
from causvid_jax.config import ConfigError

CACHE_DIR, CACHE_SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
from absl import flags
from causvid_jax.config import RunError
from causvid_jax.cli import common

CONFIG = common.define_config_flag()
MODE = flags.DEFINE_integer("mode", 0, "What to do.")


def main():
    recipe = common.load_recipe(CONFIG)
    if MODE.value == 1:
        raise KeyboardInterrupt
    if MODE.value == 2:
        raise ZeroDivisionError("a defect")
    if MODE.value == 3:
        raise RunError("the loss is nan; the checkpoint is of step 2")
    print(recipe.name, recipe.video.frames, recipe.diffusion.denoising_timesteps, recipe.causal.context_pass)


common.run(main)
"""
RECIPE = """
def get_config(arg="plain"):
    return dict(name=arg, video=dict(frames=81))
"""
BROKEN = """
def get_config():
    return undefined_name
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "broken.py").write_text(BROKEN)
    (folder / "empty.py").write_text("")
    return folder


def call(place, *arguments):
    done = subprocess.run(
        [sys.executable, "program.py", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_every_field_can_be_set_from_the_command_line(place):
    status, out, err = call(
        place,
        "--config=recipe.py:named",
        "--config.video.frames=9",
        "--config.diffusion.denoising_timesteps=(1000., 500.)",
        "--noconfig.causal.context_pass",
    )
    assert (status, out, err) == (0, "named 9 (1000.0, 500.0) False", "")


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        ([], "no --config is given; for example --config=configs/digits.py"),
        (["--config=recipe.py", "--config.foo=1"], "config field 'foo' does not exist; accepted: name, video, text"),
        (["--config=recipe.py", "--config.video.frames=10"], "video.frames is 10; it must be 1 + 4n"),
        (["--config=nowhere.py"], "config file nowhere.py does not exist"),
        (["--config=recipe.py", "--mood=1"], "Unknown command line flag 'mood'"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(place, arguments, sentence):
    status, out, err = call(place, *arguments)
    assert status == 2 and out == ""
    assert err.count("\n") == 0 and err.startswith("error: ") and sentence in err


def test_ctrl_c_is_one_line_and_status_130(place):
    assert call(place, "--config=recipe.py", "--mode=1") == (130, "", "stopped by Ctrl-C")


def test_a_run_that_cannot_go_on_is_one_sentence_and_status_1(place):
    assert call(place, "--config=recipe.py", "--mode=3") == (
        1,
        "",
        "error: the loss is nan; the checkpoint is of step 2",
    )


def test_a_defect_keeps_its_traceback(place):
    status, _, err = call(place, "--config=recipe.py", "--mode=2")
    assert status == 1 and "Traceback" in err and err.endswith("ZeroDivisionError: a defect")


@pytest.mark.parametrize(
    "argument,sentence",
    [
        ("--config.train_vae.stps=1", "config field 'train_vae.stps' does not exist; did you mean 'train_vae.steps'?"),
        ("-config.name.x=1", "config field 'name.x' does not exist: name is no group"),
        ("--noconfig.causal.context_pss", "did you mean 'causal.context_pass'?"),
        ("--config.train_distill.guidance=3", "was renamed; write 'train_distill.guidance_scale'"),
        ("--config.causal.at_switch=keep", "was renamed; write 'causal.on_prompt_switch'"),
        ("--config.vae.base_dims", "did you mean 'vae.base_dim'?"),
    ],
)
def test_overrides_of_fields_that_do_not_exist(argument, sentence):
    with pytest.raises(ConfigError) as caught:
        common.check_overrides(["--config=x.py", "--prompt=a.b", argument])
    assert sentence in str(caught.value)


def test_overrides_of_fields_that_exist():
    common.check_overrides(["--config.train_distill.critic_optimizer.b1=0.", "--noconfig.vae.dtype", "--configs.x=1"])


@pytest.mark.parametrize(
    "name,sentence",
    [
        ("broken.py", "cannot be run: NameError: name 'undefined_name' is not defined"),
        ("empty.py", "has no get_config function"),
        ("", "does not exist"),
    ],
)
def test_recipe_files_that_do_not_work(place, name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        common.load_recipe_file(str(place / name) if name else name)


def test_output_paths(tmp_path):
    assert common.check_output(str(tmp_path / "a" / "x.mp4"), (".mp4", ".gif")) == tmp_path / "a" / "x.mp4"
    assert (tmp_path / "a").is_dir()
    with pytest.raises(ConfigError, match=r"--output is 'x.avi'; it must end in .mp4 or .gif"):
        common.check_output("x.avi", (".mp4", ".gif"))
    (tmp_path / "d.mp4").mkdir()
    with pytest.raises(ConfigError, match="is a directory; it must be a file"):
        common.check_output(str(tmp_path / "d.mp4"), (".mp4",))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--contact x?.*cannot be written"):
        common.check_output(str(tmp_path / "file" / "x.png"), (".png",), flag="contact")


def test_compilation_cache_goes_where_the_environment_says(tmp_path, monkeypatch):
    before = {name: getattr(jax.config, name) for name in (CACHE_DIR, CACHE_SECONDS)}
    try:
        jax.config.update(CACHE_DIR, None)
        monkeypatch.setenv("CAUSVID_JAX_CACHE", "")
        assert common.enable_compilation_cache() is None
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("CAUSVID_JAX_CACHE", str(tmp_path / "file" / "x"))
        assert common.enable_compilation_cache() is None and jax.config.jax_compilation_cache_dir is None
        ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
        monkeypatch.setenv("CAUSVID_JAX_CACHE", ours)
        assert common.enable_compilation_cache() == ours == jax.config.jax_compilation_cache_dir
        jax.config.update(CACHE_DIR, theirs)  # what JAX makes of JAX_COMPILATION_CACHE_DIR
        assert common.enable_compilation_cache() == theirs == jax.config.jax_compilation_cache_dir
        monkeypatch.delenv("CAUSVID_JAX_CACHE")
        monkeypatch.setenv("HOME", str(tmp_path))
        jax.config.update(CACHE_DIR, None)
        assert common.enable_compilation_cache() == str(tmp_path / ".cache" / "causvid_jax")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
