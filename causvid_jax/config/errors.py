"""Errors that a user reads: one sentence each."""


class ConfigError(ValueError):
    """A configuration or an input cannot work; the message names the value and what is accepted."""


class RunError(RuntimeError):
    """A run cannot continue; the message says why, where it stopped and what lets it continue."""


def require(condition: object, message: str) -> None:
    """Raise :class:`ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)
