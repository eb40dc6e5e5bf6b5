"""Programs run in the process of their tests, which keep JAX's own compilation cache."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_cache_of_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAUSVID_JAX_CACHE", "")
        yield
