"""Flags, recipes by name, one-sentence errors and the exit status of a process."""

import dataclasses
import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Literal

import jax
import numpy as np
import pytest

from causvid_jax import cli, media
from causvid_jax.cli import common
from causvid_jax.cli.options import config_option, help_text, option, parse
from causvid_jax.config import ConfigError, Recipe, RunError
from causvid_jax.config.recipes import load_recipe, names
from tests.refusals import refused

CACHE_DIR, CACHE_SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
ROOT = pathlib.Path(__file__).parents[2]
RECIPE = """
def get_config(arg="plain"):
    return dict(name=arg, video=dict(frames=81))
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of a program."""

    config: Recipe = config_option()
    prompt: tuple[str, ...] = option((), "What to show.")
    frames: int | None = option(None, "How many.")
    strength: float = option(0.5, "How far.")
    mode: Literal["keep", "reset"] = option("keep", "What to do.")
    quick: bool = option(False, "Do less.")


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.py").write_text(RECIPE)
    return f"--config={tmp_path}/recipe.py"


def test_every_flag_and_every_field_can_be_set(recipe):
    options = parse(
        Options,
        [
            f"{recipe}:named",
            "--config.video.frames=9",
            "--config.diffusion.denoising_timesteps=(1000., 500.)",
            "--noconfig.causal.context_pass",
            *("--prompt", "a = b", "--prompt=--c", "--frames=3", "-strength=1e-1", "--mode=reset", "--quick"),
        ],
    )
    config = options.config
    assert (config.name, config.video.frames, config.causal.context_pass) == ("named", 9, False)
    assert config.diffusion.denoising_timesteps == (1000.0, 500.0)
    assert options.prompt == ("a = b", "--c") and (options.frames, options.strength) == (3, 0.1)
    assert (options.mode, options.quick) == ("reset", True)
    assert parse(Options, [recipe, "--quick", "--noquick"]).quick is False


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["--frames=1"], "no --config is given; for example --config=digits"),
        (["{recipe}", "--config.foo=1"], "config field 'foo' does not exist; accepted: name, video, text"),
        (["{recipe}", "--config.video.frames=10"], "video.frames is 10"),
        (["{recipe}", "--config.video=10"], "config field 'video' is a group"),
        (["{recipe}", "--config.train_vae.stps=1"], "did you mean 'train_vae.steps'?"),
        (["{recipe}", "-config.name.x=1"], "'name.x' does not exist: name is no group"),
        (["{recipe}", "--noconfig.causal.context_pss"], "did you mean 'causal.context_pass'?"),
        (["{recipe}", "--config.causal.at_switch=keep"], "was renamed; write 'causal.on_prompt_switch'"),
        (["{recipe}", "--config.diffusion.denoising_timesteps=4"], "diffusion.denoising_timesteps is 4"),
        (["--config=nowhere.py"], "config file nowhere.py does not exist; accepted: a file, or one of digits"),
        (["--config=digit"], "did you mean 'digits'?"),
        (["--config="], "no --config is given; for example --config=digits"),
        (["{recipe}", "--promt=1"], "flag --promt does not exist; did you mean --prompt?"),
        (["{recipe}", "--mood=1"], "flag --mood does not exist; did you mean --mode?"),
        (["{recipe}", "--frames=\u00b2"], "--frames is '\u00b2'; it must be a whole number"),
        (["{recipe}", "--frames=1_0"], "it must be a whole number"),
        (["{recipe}", "--frames"], "--frames has no value"),
        (["{recipe}", "--strength=half"], "--strength is 'half'; it must be a number"),
        (["{recipe}", "--mode=forget"], "--mode is 'forget'; accepted: keep, reset"),
        (["{recipe}", "--quick=maybe"], "--quick is 'maybe'; accepted: true, false"),
        (["{recipe}", "digits"], "unexpected argument 'digits'; every option is --name=value"),
    ],
)
def test_bad_flags_are_one_sentence(recipe, arguments, sentence):
    with pytest.raises(ConfigError) as error:
        parse(Options, [argument.format(recipe=recipe) for argument in arguments])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text,sentence",
    [
        ("def get_config():\n    return undefined_name", "cannot be run: NameError: name 'undefined_name'"),
        ("", "has no get_config function"),
        ("def get_config(:", "cannot be run: SyntaxError"),
    ],
)
def test_recipe_files_that_do_not_work(tmp_path, text, sentence):
    (tmp_path / "broken.py").write_text(text)
    refused(sentence, load_recipe, str(tmp_path / "broken.py"))


def test_recipes_by_name_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names() == ["digits", "wan_14b", "wan_1_3b"] or set(names()) > {"digits", "wan_14b", "wan_1_3b"}
    assert load_recipe("digits:two").name == "two_digits"
    assert load_recipe("wan_14b:i2v").teacher.image_dim == 1280
    (tmp_path / "mine.py").write_text("from . import base\n\ndef get_config():\n    return base.VALUES\n")
    (tmp_path / "base.py").write_text("VALUES = {'name': 'mine'}\n")
    assert load_recipe("mine.py").name == "mine"  # a recipe may import its neighbours


def test_help_names_every_flag_and_what_config_means():
    text = help_text(Options, "causvid x", "About.")
    for words in ("--config=CONFIG", "a name (digits", "--config.GROUP.FIELD=VALUE", "--[no]quick", "Default: 0.5."):
        assert words in text


@pytest.mark.parametrize(
    "error,status,text",
    [
        (ConfigError("a\nb"), 2, "error: a b"),
        (RunError("the loss is nan"), 1, "error: the loss is nan"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_errors_have_a_status(monkeypatch, capsys, error, status, text):
    def fail(*_):
        raise error

    monkeypatch.setattr(common, "call", fail)
    with pytest.raises(SystemExit) as ended:
        common.run("train", [])
    assert ended.value.code == status and capsys.readouterr().err.strip() == text


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_a_program_as_ctrl_c_does_and_finish_its_video(tmp_path, monkeypatch, capsys, number, status):
    frames = np.zeros((5, 16, 16, 3), np.uint8)

    def killed(*_):
        with media.VideoWriter(tmp_path / "a.mp4", 16) as out:
            out.append(frames)
            os.kill(os.getpid(), number)
            time.sleep(10)

    monkeypatch.setattr(common, "call", killed)
    inherited = signal.signal(number, signal.SIG_DFL)  # nohup leaves SIGHUP ignored
    try:
        with pytest.raises(SystemExit) as ended:
            common.run("sample", [])
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, inherited)
    assert ended.value.code == status and capsys.readouterr().err == f"stopped by {number.name}\n"
    assert len(media.read_video(tmp_path / "a.mp4", 16, 16)) == 5 and os.listdir(tmp_path) == ["a.mp4"]


def test_a_reader_that_ends_early_gets_no_traceback():
    command = f"{sys.executable} -c 'from causvid_jax.cli import main; main()' sample --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """As under ``nohup``."""
    monkeypatch.setattr(common, "call", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        common.run("sample", [])
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(common, "call", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        common.run("train", [])


def test_help_and_a_refused_flag_import_no_jax():
    """Importing JAX takes most of the seconds that a user would wait."""
    programs = ["sample", "train", "demo", "evaluate", "bench", "compile", "export"]
    code = f"""
import sys
from causvid_jax.cli import common
for program in {programs}:
    common.call(program, ["--help"])
    try:
        common.run(program, ["--nosuchflag=1"])
    except SystemExit as ended:
        assert ended.code == 2 and "jax" not in sys.modules, program
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.count("--nosuchflag does not exist") == len(programs), done.stderr
    assert done.stdout.count("options:") == len(programs) and time.monotonic() - start < 20


def test_the_two_doors_are_the_same(tmp_path):
    for command in (["-m", "launch.sample"], ["-c", "from causvid_jax.cli import main; main()", "sample"]):
        done = subprocess.run(
            [sys.executable, *command, "--config=digits"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: no --prompt is given")


def test_the_version_is_that_of_the_package(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["causvid", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"causvid_jax {importlib.metadata.version('causvid_jax')}\n"


def test_output_paths(tmp_path):
    assert common.check_output(str(tmp_path / "a" / "x.mp4"), (".mp4", ".gif")) == tmp_path / "a" / "x.mp4"
    assert (tmp_path / "a").is_dir()
    refused(r"--output is 'x.avi'; it must end in .mp4 or .gif", common.check_output, "x.avi", (".mp4", ".gif"))
    (tmp_path / "d.mp4").mkdir()
    refused("is a directory; it must be a file", common.check_output, str(tmp_path / "d.mp4"), (".mp4",))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--contact x?.*cannot be written"):
        common.check_output(str(tmp_path / "file" / "x.png"), (".png",), flag="contact")


@pytest.mark.parametrize("device, quiet", [("null", True), ("accel0", False), ("vfio", False)])
def test_libtpu_is_quiet_only_on_a_machine_without_a_tpu(device, quiet, tmp_path, monkeypatch):
    environment = {"TPU_ACCELERATOR_TYPE": "v6e-8"}
    monkeypatch.setattr(os, "environ", environment)
    (tmp_path / device).touch()
    common.quiet_libtpu(tmp_path)
    assert environment == (common.NO_TPU if quiet else {}) | {"TPU_ACCELERATOR_TYPE": "v6e-8"}


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
