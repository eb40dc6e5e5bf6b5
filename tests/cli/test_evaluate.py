"""The report's flags: one sentence for what it cannot do, before any compute."""

import pytest

from causvid_jax.cli import common
from causvid_jax.config import ConfigError


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
    ],
)
def test_weights_that_cannot_be_measured(tmp_path, monkeypatch, config, arguments, message):
    monkeypatch.setattr(common, "enable_compilation_cache", lambda: None)
    output = tmp_path / "report.json"
    with pytest.raises(ConfigError, match=message):
        common.call("evaluate", [f"--config={config}", f"--output={output}", *arguments])
    assert not output.exists()
