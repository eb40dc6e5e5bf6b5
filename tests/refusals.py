"""How tests check that bad input is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from causvid_jax.config import ConfigError


def refused(words: str, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> None:
    """Check that ``call(*arguments, **options)`` is refused by one line, in which the pattern ``words`` is found."""
    with pytest.raises(ConfigError, match=words) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
