"""The benchmark's flags: one sentence for what it cannot do, before any compute."""

import pytest

from causvid_jax.analysis import bench
from causvid_jax.checkpoints.workdir import ASSETS
from causvid_jax.cli import common
from causvid_jax.config import ConfigError
from tests.refusals import refused

CONFIG, OUTPUT = "--config=digits", "--output={folder}/bench.json"


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([CONFIG], "no --output is given; it must be a file that ends in .json"),
        ([CONFIG, "--output=bench.txt"], "must end in .json"),
        ([CONFIG, OUTPUT, "--repeats=1"], "--repeats is 1; it must be at least 2"),
        ([CONFIG, OUTPUT, "--codecs=wan,h264"], "--codecs names 'h264'; accepted: wan, taehv"),
        ([CONFIG, OUTPUT, "--codecs=wan,wan"], "--codecs names ('wan', 'wan') twice"),
        ([CONFIG, OUTPUT, "--student=nothing.pt"], "student weights nothing.pt do not exist"),
        ([OUTPUT, "--student=self_forcing_dmd.pt"], "student weights self_forcing_dmd.pt do not exist"),
        ([CONFIG, OUTPUT, "--against=nothing.json"], "--against nothing.json cannot be read"),
        ([CONFIG, OUTPUT, "--config.causal.window=1"], "causal.window is 1"),
    ],
)
def test_bad_flags_are_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ConfigError) as error:
        common.call("bench", [argument.format(folder=tmp_path) for argument in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_named_weights_are_measured(tmp_path, monkeypatch):
    """The student and its decoder come from files; the report says which."""
    measured = {}

    def run(recipe, plan, log, *, params, weights):
        measured.update(params=params, weights=weights)
        raise ConfigError("measured")

    monkeypatch.setattr(bench, "run", run)
    path = ASSETS / "digits" / "distill.safetensors"
    refused("measured", common.call, "bench", [CONFIG, OUTPUT.format(folder=tmp_path), f"--student={path}"])
    assert set(measured["params"]) == {"student", "vae"} and isinstance(measured["params"]["student"]["blocks"], tuple)
    assert measured["weights"] == "student distill.safetensors, vae vae.safetensors"
