"""The report's flags: one sentence for what it cannot do, before any compute."""

import numpy as np
import pytest

from causvid_jax import media
from causvid_jax.checkpoints import store
from causvid_jax.cli import common
from causvid_jax.config import ConfigError
from causvid_jax.sampling import batch
from causvid_jax.sampling.protocols import Samplers
from tests.programs import write_recipe
from tests.tiny import RECIPE, save_classifier, tiny_workdir


@pytest.mark.parametrize(
    "config,arguments,message",
    [
        ("digits:two", [], "recipe 'two_digits' comes with no trained"),
        (
            "digits",
            ["--student_only", "--teacher=own.safetensors"],
            "--teacher=own.safetensors and --student_only are both given",
        ),
        ("digits", ["--student_only", "--student=own.safetensors"], "own.safetensors"),
        ("own", ["--student_only"], "has data.name 'videos'; the report measures moving digits. For other videos use"),
    ],
)
def test_weights_that_cannot_be_measured(tmp_path, monkeypatch, config, arguments, message):
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)
    output = tmp_path / "report.json"
    with pytest.raises(ConfigError, match=message):
        common.call("evaluate", [f"--config={config}", f"--output={output}", *arguments])
    assert not output.exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A working directory of random weights, with a classifier and the recipe's file."""
    folder = tiny_workdir(tmp_path_factory.mktemp("evaluate"))
    save_classifier(folder)
    write_recipe(folder, RECIPE)
    return folder


def refused(trained, output, capsys, *flags):
    """Return what the program says on stderr as it ends with status 2 and writes no report."""
    paths = [f"--config={trained}/recipe.py", f"--workdir={trained}", f"--output={output}/report.json"]
    with pytest.raises(SystemExit) as ended:
        common.run(
            "evaluate",
            [*paths, f"--classifier={trained}/classifier.safetensors", "--samples=2", "--reference=2", *flags],
        )
    assert ended.value.code == common.BAD_INPUT and list(output.iterdir()) == []
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "name,value", [("vae", np.nan), ("distill", np.inf), ("teacher", np.nan), ("classifier", np.inf)]
)
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(trained, tmp_path, capsys, name, value):
    path = trained / ("classifier.safetensors" if name == "classifier" else f"{name}/weights.safetensors")
    whole = path.read_bytes()
    params, metadata = store.load_params(path, dtype=None)
    flat = store.flatten(params)
    worst = sorted(flat)[-1]
    flat[worst].reshape(-1)[-1] = value
    try:
        store.save_params(path, store.unflatten(flat), metadata)
        said = refused(trained, tmp_path, capsys)
    finally:
        path.write_bytes(whole)
    assert said.startswith(f"error: tensor {worst} of {path} holds a NaN or an infinity")


@pytest.mark.parametrize("row,value", [("vae", np.nan), ("student", np.inf), ("long", np.nan)])
def test_frames_that_are_not_finite_name_their_row_and_nothing_is_written(
    trained, tmp_path, capsys, monkeypatch, row, value
):
    def made(name, frames, count):
        return media.to_uint8(np.full((count, frames, 16, 16, 3), value if name == row else 0.0, np.float32))

    def make_samplers(*_, **__):
        return Samplers(
            reconstruct=lambda video: made("vae", video.shape[1], len(video)),
            teacher=None,
            student=lambda prompts, seed, *, frames, **_: made(
                "long" if frames > 9 else "student", frames, len(prompts)
            ),
        )

    monkeypatch.setattr(batch, "make_samplers", make_samplers)
    said = refused(trained, tmp_path, capsys, "--student_only")
    assert said.startswith(f"error: row {row!r} of the report, clips from 0 on: the frames are not finite (NaN or inf")
