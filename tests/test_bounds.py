"""Every number that a flag or a config field takes has limits, and a number beyond them is refused in one sentence."""

import dataclasses
import importlib
import re
import types
import typing
from typing import Annotated

import pytest

from causvid_jax.analysis import memory
from causvid_jax.cli import PROGRAMS, common
from causvid_jax.config import ConfigError, Recipe
from causvid_jax.config.fields import field_types
from causvid_jax.config.recipes import load_recipe, override

ABSURD = {int: ("1000000000000", "-1000000000000", "-2"), float: ("nan", "inf", "-inf", "-1000000000000")}
NEEDED = {
    "sample": ["--config=digits", "--prompt=a red 3"],
    "prepare": ["--config=digits", "--stage=data", "--workdir=x"],
    "train": ["--config=digits", "--stage=vae", "--workdir=x"],
    "road": ["--config=digits", "--workdir=x"],
    "convert": ["--input=a", "--output=b"],
    "export": ["--stage=vae", "--workdir=."],
    "curves": [],
}


def number(hint):
    """Return int or float if an annotation is of one, of several or of none of these; else None."""
    if typing.get_origin(hint) in (Annotated, tuple, typing.Union, types.UnionType):
        kinds = [number(inner) for inner in typing.get_args(hint) if inner is not Ellipsis]
        return next((kind for kind in kinds if kind), None)
    return hint if hint in (int, float) else None


def fields(cls=Recipe, path=""):
    """Return (dotted path, type of number, whether it is a list) of the numbers of a configuration."""
    for name, hint in field_types(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{path}{name}.")
        elif number(hint):
            yield path + name, number(hint), typing.get_origin(hint) is tuple


FLAGS = [
    (program, name, number(hint))
    for program in PROGRAMS
    for name, hint in typing.get_type_hints(importlib.import_module(f"causvid_jax.cli.{program}").Options).items()
    if number(hint)
]


def test_the_flags_and_fields_are_found():
    assert len(FLAGS) >= 40 and len(list(fields())) >= 150


def test_an_absurd_number_of_a_flag_is_refused(capsys):
    for program, flag, kind in FLAGS:
        for text in (*ABSURD[int], *(ABSURD[float] if kind is float else ())):
            with pytest.raises(SystemExit) as ended:
                common.run(program, [*NEEDED.get(program, ["--config=digits"]), f"--{flag}={text}"])
            said = capsys.readouterr().err
            assert ended.value.code == common.BAD_INPUT, (program, flag, text, said)
            assert re.fullmatch(rf"error: --{flag} is {re.escape(text)[:3]}[^\n]*\n", said), (program, said)


def test_an_absurd_number_of_a_field_is_refused():
    recipe = load_recipe("own")  # without curricula, which take most of the time of a check
    for path, kind, several in fields():
        for text in ABSURD[kind]:
            with pytest.raises(ConfigError) as error:
                override(recipe, {path: f"({text},)" if several else text})
            assert path.rsplit(".", 1)[-1] in str(error.value) and "\n" not in str(error.value), (path, text)


SQUARE = ("--config.video.height=4096", "--config.video.width=4096")
LONG = ("--config.video.frames=99993",)
ENDLESS = (
    *("--config.causal.window=0", "--config.causal.sink=0"),
    *("--config.train_distill.continuation_prob=0", "--config.train_distill.prompt_switch_prob=0"),
)
TOGETHER = [
    ("sample", ["--prompt=a red 3", "--frames=9999999", *ENDLESS, *SQUARE], "to stream takes about"),
    ("sample", [*["--prompt=a red 3"] * 1024, *SQUARE], "to stream takes about"),
    ("sample", ["--prompt=a red 3", "--teacher", "--frames=99993", *SQUARE], "to denoise takes about"),
    ("serve", ["--sessions=1000", "--port=0", *SQUARE], "to serve 1000 sessions takes about"),
    ("bench", ["--output=bench.json", "--streams=4096", *SQUARE], "to stream takes about"),
    ("prepare", ["--stage=data", *SQUARE, *LONG], "to make the stage 'data' takes about"),
    ("prepare", ["--stage=latents", *SQUARE, *LONG], "to encode a batch of clips takes about"),
    ("prepare", ["--stage=videos", "--batch=4096", *SQUARE], "to encode a batch of clips takes about"),
    ("prepare", ["--stage=trajectories", *SQUARE], "to denoise takes about"),
    ("prepare", ["--stage=trajectories", "--config.teacher.linear=int8", *SQUARE], "to denoise takes about"),
    ("prepare", ["--stage=streams", *SQUARE], "to stream takes about"),
    (
        "evaluate",
        ["--output=r.json", "--student_only", "--batch=4096", "--long_factor=1000"],
        "to evaluate takes about",
    ),
    ("evaluate", ["--output=r.json", "--student_only", "--samples=1000000", "--batch=1"], "to evaluate takes about"),
    ("evaluate", ["--output=r.json", "--batch=64", *SQUARE], "to stream takes about"),
    ("compile", ["--stage=stream", "--platform=cpu", "--output=x.program", "--batch=4096", *SQUARE], "the device has"),
    ("compile", ["--stage=stream", "--platform=cuda", "--output=x.program", "--batch=4096", *SQUARE], "has less than"),
]


@pytest.mark.parametrize("program,flags,words", TOGETHER)
def test_numbers_too_large_together_are_refused_before_memory_is_asked_for(
    program, flags, words, tmp_path, monkeypatch
):
    """On a machine of 64 GiB. The memory of this process grows by less than a batch of any of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "host_memory", lambda: 2**36)
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)
    before = memory.peak_rss()
    flags = [*flags, "--workdir=run"] if program == "prepare" else flags
    with pytest.raises(ConfigError) as error:
        common.call(program, ["--config=digits", *flags])
    assert re.search(rf"{words}.*; to reduce it: ", str(error.value)) and "\n" not in str(error.value)
    assert memory.peak_rss() - before < 2**30 and [p.name for p in tmp_path.iterdir()] in ([], ["run"])
