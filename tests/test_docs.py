"""The documents say what is there: code runs, links lead somewhere, names and tables are those of the program."""

import ast
import dataclasses
import importlib
import json
import pathlib
import re

import pytest

from causvid_jax.cli import PROGRAMS
from causvid_jax.config.recipe import RENAMED

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_runs_and_links_lead_somewhere(page):
    text = page.read_text()
    codes = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    for code in codes if "research" not in page.parts else []:  # the notebook's code needs the weights of its trainings
        exec(compile(code, str(page), "exec"), {})
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"


def test_the_reading_path_is_at_most_2000_lines_and_names_what_is_there():
    rows = re.findall(r"^\| \d .*?`(\S+\.py)` \| `(\w+)`", (ROOT / "docs/reading.md").read_text(), re.M)
    lines = 0
    assert len(rows) == 9
    for path, name in rows:
        source = (ROOT / path).read_text()
        lines += source.count("\n")
        assert name in {getattr(node, "name", None) for node in ast.parse(source).body}, f"{path} has no {name}"
    assert lines <= 2000


def test_former_config_keys_are_those_that_the_program_refuses():
    text = (ROOT / "docs/names.md").read_text().split("## Former config keys")[1]
    rows = dict(re.findall(r"^\| `(\S+)` \| `(\S+)` \|", text, re.M))
    assert rows == {old: f"{old.rsplit('.', 1)[0]}.{new}" for old, new in RENAMED.items()}


def test_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150


def test_the_manual_has_every_program():
    headings = set(re.findall(r"^## (\w+)$", (ROOT / "docs/cli.md").read_text(), re.M))
    assert set(PROGRAMS) <= headings


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_manual_names_every_flag(program):
    text = re.split(r"^## ", (ROOT / "docs/cli.md").read_text(), flags=re.M)
    flags = next(part for part in text if part.startswith(f"{program}\n")).split("Flags:")[1]
    options = importlib.import_module(f"causvid_jax.cli.{program}").Options
    fields = {field.name for field in dataclasses.fields(options)} - {"config"}
    assert set(re.findall(r"`--(\w+)`", flags)) - {"help"} == fields


def test_figures_of_the_readme_are_those_of_the_committed_report():
    rows = {
        "real test clips": "real",
        "real, through the VAE": "vae",
        "teacher, 50 guided steps": "teacher",
        "student, 4 steps": "student",
        "student, last 81 frames of 837": "long",
        "student, last 81 frames of 8,397": "longest",
    }
    columns = ("digit", "first_block", "identity", "color", "direction", "sharpness")
    table = (ROOT / "README.md").read_text().split("| sharpness |\n")[1].split("\n\n")[0].splitlines()[1:]
    frames = json.loads((ROOT / "docs/digits_report.json").read_text())["frames"]
    assert len(table) == len(rows)
    for line in table:
        name, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        values = [frames[rows[name]][column]["mean"] for column in columns]
        assert [float(figure) for figure in figures] == pytest.approx(values, abs=0.0051), name


def test_figures_of_the_evidence_are_those_of_its_json():
    """A section shows figures of the experiment that it links to: mean (low to high), rounded once."""
    sections = re.split(r"^## ", (ROOT / "docs/evidence.md").read_text(), flags=re.M)[1:]
    assert len(sections) == 7
    for section in sections:
        name = re.search(r"\(evidence/(\w+)\.md\)", section)[1]
        rows = json.loads((ROOT / f"docs/evidence/{name}.json").read_text())["rows"]
        measured = [value for row in rows.values() for figures in row.values() for value in figures.values()]
        known = {f"{v['mean']:.2f} ({v['low']:.2f} to {v['high']:.2f})" for v in measured if isinstance(v, dict)}
        shown = re.findall(r"\d\.\d\d \(\d\.\d\d to \d\.\d\d\)", section)
        assert shown and not set(shown) - known, name
