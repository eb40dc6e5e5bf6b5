"""Every command that README, manuals and docstrings show is one that the programs accept."""

import importlib
import pathlib
import re
import shlex
import sys

import pytest

from causvid_jax.cli import PROGRAMS, main, options, train
from causvid_jax.config import ConfigError, published
from causvid_jax.config.recipes import load_recipe
from causvid_jax.diffusion import flow

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/benchmarks/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PAGES += [
    path for folder in ("causvid_jax/cli", "configs", "examples") for path in sorted((ROOT / folder).glob("*.py"))
]
BENCHMARK = re.compile(r"python3? (benchmarks/\w+\.py)((?:[^`#\n\\]|\\\n)*)")
COMMAND = re.compile(r"(?:\bcausvid|python3? -m launch\.)[ ]?(\w+)[ ]+(--(?:[^`#\n\\]|\\\n|\\(?!\n))*)")


def commands(page: pathlib.Path) -> list[tuple[str, list[str]]]:
    """Return (program, arguments) of a page's commands, without those that have ``...`` or a placeholder."""
    result = []
    page_text = re.sub(r"\$\w+", "21", page.read_text())  # the variable of a loop in a shell
    for program, text in COMMAND.findall(page_text.replace("\\\\\n", "\\\n")):
        text = text.replace("\\\n", " ").strip().strip("*.,;)")
        words = shlex.split(text.replace("|", " "), comments=True)
        whole = "=" in text and "..." not in text and not re.search(r"=[A-Z]{3,}\b", text)
        if program in PROGRAMS and whole:
            result.append((program, words))
    return result


CASES = [(page, *command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("page, program, arguments", CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_a_command_that_is_shown_is_accepted(page, program, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f"causvid_jax.cli.{program}")
    try:
        options.parse(module.Options, arguments)
    except ConfigError as error:
        pytest.fail(f"{page.name} shows: causvid {program} {' '.join(arguments)}\n{error}")


@pytest.mark.parametrize("page, program, arguments", CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_a_published_student_is_shown_with_its_own_timesteps(page, program, arguments, monkeypatch):
    """``wan_1_3b`` has the shift 8 and Self-Forcing's student 5: it would be sampled at timesteps of no training."""
    monkeypatch.chdir(ROOT)
    model = next((published.find(word[10:]) for word in arguments if word.startswith("--student=")), None)
    if model is not None:
        recipe = options.parse(importlib.import_module(f"causvid_jax.cli.{program}").Options, arguments).config
        assert flow.student_timesteps(recipe.diffusion) == flow.student_timesteps(
            load_recipe(f"published:{model.name}").diffusion
        )


@pytest.mark.parametrize(
    "program,others", [("sample", ["--prompt=a red panda"]), ("serve", []), ("bench", ["--output=bench.json"])]
)
def test_the_name_of_a_published_student_chooses_the_recipe(program, others):
    arguments = ["--student=self_forcing_dmd.pt", *others]
    module = importlib.import_module(f"causvid_jax.cli.{program}")
    assert options.parse(module.Options, arguments).config.name == "published:self_forcing_dmd"


def test_the_list_of_programs_separates_names_from_texts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["causvid", "--help"])
    main()
    lines = capsys.readouterr().out.splitlines()
    for program, about in PROGRAMS.items():
        assert [line.split(None, 1) for line in lines].count([program, about]) == 1, program


def test_benchmarks_that_are_shown_have_their_flags():
    shown = [(page, *match) for page in PAGES for match in BENCHMARK.findall(page.read_text())]
    assert len(shown) >= 10 and any("--" in text for _, _, text in shown)
    for page, script, text in shown:
        source = (ROOT / script).read_text()
        for flag in re.findall(r" --([a-z][\w-]*)", text):
            assert f'"--{flag}"' in source, f"{page.name} shows {script} --{flag}"


def test_commands_are_found():
    assert len(CASES) >= 30
    assert {"sample", "train", "prepare", "convert", "compile"} <= {program for _, program, _ in CASES}


def test_the_meshes_of_many_hosts_fit_the_stage_that_they_train(monkeypatch):
    """Commands of ``launch.slurm`` and ``launch.tpu`` give what follows ``--`` to ``causvid train``."""
    monkeypatch.chdir(ROOT)
    flags = re.findall(r"-- (--config\.parallel\S+)$", (ROOT / "docs/hosts.md").read_text(), re.M)
    assert len(flags) == 3
    for flag in flags:
        options.parse(train.Options, ["--config=configs/wan_14b.py", "--stage=distill", "--workdir=run", flag])
