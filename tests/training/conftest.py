"""Shared by the tests of the training stages."""

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """Return a working directory of the tiny recipe with random weights and data, which tests read only."""
    folder = tiny.tiny_workdir(tmp_path_factory.mktemp("workdir"))
    (folder / "consistency").symlink_to(folder / "init")
    return folder
