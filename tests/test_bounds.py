"""Every number that a flag or a config field takes has limits, and a number beyond them is refused in one sentence."""

import dataclasses
import importlib
import re
import types
import typing
from typing import Annotated

import pytest

from causvid_jax.cli import PROGRAMS, common
from causvid_jax.config import ConfigError, Recipe
from causvid_jax.config.fields import field_types
from causvid_jax.config.recipes import load_recipe

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


@pytest.mark.parametrize("program,flag,kind", FLAGS)
def test_an_absurd_number_of_a_flag_is_refused(program, flag, kind, capsys):
    for text in (*ABSURD[int], *(ABSURD[float] if kind is float else ())):
        with pytest.raises(SystemExit) as ended:
            common.run(program, [*NEEDED.get(program, ["--config=digits"]), f"--{flag}={text}"])
        said = capsys.readouterr().err
        assert ended.value.code == common.BAD_INPUT, (text, said)
        assert re.fullmatch(rf"error: --{flag} is {re.escape(text)[:3]}[^\n]*\n", said), said


@pytest.mark.parametrize("path,kind,several", list(fields()))
def test_an_absurd_number_of_a_field_is_refused(path, kind, several):
    for text in ABSURD[kind]:
        with pytest.raises(ConfigError) as error:
            load_recipe("digits", {path: f"({text},)" if several else text})
        assert path.rsplit(".", 1)[1] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text,message",
    [
        ("4", r"denoising_timesteps is 4; it must be a sequence"),
        ("(4,)", r"denoising_timesteps is \(4.0,\); it must be a list .* that begins with 1000"),
        ("()", r"denoising_timesteps is \(\); it must be a list"),
        ("(1000, 500, 750)", r"denoising_timesteps is \(1000.0, 500.0, 750.0\); .* descending"),
    ],
)
def test_a_list_that_cannot_be_a_schedule_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("digits", {"diffusion.denoising_timesteps": text})
    with pytest.raises(ConfigError, match="student_steps' was renamed; write 'diffusion.denoising_timesteps'"):
        load_recipe("digits", {"diffusion.student_steps": text})
