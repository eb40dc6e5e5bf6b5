"""Refusal of what cannot work, in one sentence."""


class ConfigError(ValueError):
    """A configuration or an input that cannot work; the message names the value and what would be accepted."""


class RunError(RuntimeError):
    """A run that cannot go on; the message says why, where it stopped and what would make it go on."""


def require(condition: object, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def check_dtype(owner: str, dtype: str) -> None:
    """Refuse a compute type that is neither of the two there are."""
    require(dtype in ("float32", "bfloat16"), f"{owner}.dtype is {dtype!r}; accepted: 'float32', 'bfloat16'")


def check_fraction(name: str, value: float) -> None:
    """Refuse a share outside 0 to 1."""
    require(0 <= value <= 1, f"{name} is {value}; accepted: 0 to 1")
