"""The report's flags: one sentence for what it cannot do, before any compute."""

import pytest

from causvid_jax.cli import common
from causvid_jax.config import ConfigError


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "recipe 'two_digits' comes with no trained teacher; train it with launch.train --stage=teacher;"),
        (
            ["--student_only", "--teacher=own.safetensors"],
            "--teacher=own.safetensors and --student_only are both given",
        ),
        (["--student_only", "--student=own.safetensors"], "own.safetensors"),
    ],
)
def test_weights_that_cannot_be_measured(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)
    output = tmp_path / "report.json"
    with pytest.raises(ConfigError, match=message):
        common.call("evaluate", ["--config=digits:two", f"--output={output}", *arguments])
    assert not output.exists()
