"""The measurement of a server from its viewers' side (``causvid bench --serve``)."""

import pytest

from causvid_jax.serve import bench


def test_the_measured_server_asks_for_no_token(monkeypatch):
    """The viewers have none, whatever the environment of the measuring process holds."""
    given = []

    def popen(command, **options):
        given.append(options["env"])
        raise OSError("not started")

    monkeypatch.setenv("CAUSVID_TOKEN", "a secret of sixteen letters")
    monkeypatch.setattr(bench.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="not started"):
        bench._Process(())
    assert "PATH" in given[0] and "CAUSVID_TOKEN" not in given[0]
