"""The benchmark's flags: one sentence for what it cannot do, before any compute."""

import pytest

from causvid_jax.analysis import bench
from causvid_jax.cli import common
from causvid_jax.config import ConfigError

CONFIG, OUTPUT = "--config=digits", "--output={folder}/bench.json"


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([OUTPUT], "no --config is given"),
        ([CONFIG], "no --output is given; it must be a file that ends in .json"),
        ([CONFIG, "--output=bench.txt"], "must end in .json"),
        ([CONFIG, OUTPUT, "--repeats=1"], "--repeats is 1; it must be at least 2"),
        ([CONFIG, OUTPUT, "--codecs=wan,h264"], "--codecs names 'h264'; accepted: wan, taehv"),
        ([CONFIG, OUTPUT, "--weights=int4"], "--weights is 'int4'; accepted: compute, float32"),
        ([CONFIG, OUTPUT, "--against=nothing.json"], "--against nothing.json cannot be read"),
        ([CONFIG, OUTPUT, "--config.causal.window=1"], "causal.window is 1"),
        ([CONFIG, OUTPUT, "--streams=1000000"], "and the device has"),
    ],
)
def test_bad_flags_are_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(bench, "run", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ConfigError) as error:
        common.call("bench", [argument.format(folder=tmp_path) for argument in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)
