"""Parse a command line into a dataclass whose fields are the flags. Imports no JAX.

``--name=value`` or ``--name value`` sets a field; ``--name`` and ``--noname`` set a bool; a tuple field may be given
several times. Bounds of a number are in its annotation, as in the config: ``Annotated[int, Bounds(least=1, most=9)]``.
A field ``config`` is a recipe: ``--config=digits`` names it and ``--config.group.field=value`` sets its
fields.
"""

import dataclasses
import difflib
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.config.fields import convert
from causvid_jax.config.recipes import CONFIG_HELP, load_recipe, names, option

__all__ = ["option", "config_option", "parse", "part", "help_text"]

T = TypeVar("T")


def config_option() -> Any:
    """Return the field of the recipe, which must be given."""
    return option(None, CONFIG_HELP)


def parse(cls: type[T], arguments: Sequence[str]) -> T:
    """Return the options of a command line.

    Raises:
        ConfigError: an unknown flag, a value of another type, no recipe, or a value that ``cls`` refuses.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    config, overrides = None, {}
    words = iter(arguments)
    for word in words:
        match = re.fullmatch(r"--?([a-zA-Z][\w.]*)(=.*)?", word, re.DOTALL)
        if match is None:
            raise ConfigError(f"unexpected argument {word!r}; every option is --name=value")
        name, text = match.group(1), match.group(2) and match.group(2)[1:]
        group, dot, path = name.partition(".")
        if dot and group in ("config", "noconfig") and "config" in fields:
            overrides[path] = "False" if group == "noconfig" else _value(name, text, words)
        elif name == "config" and "config" in fields:
            config = _value(name, text, words)
        else:
            name, value = _field(name, text, words, fields)
            values[name] = (*values.get(name, ()), *value) if isinstance(value, tuple) else value
    if "config" in fields:
        default = next(field.default for field in dataclasses.fields(cls) if field.name == "config")  # type: ignore[arg-type]
        config_of = getattr(cls, "config_of", lambda values: None)
        values["config"] = _recipe(config or config_of(values) or default, overrides)
    return cls(**values)


def part(options: T, cls: type[T]) -> T:
    """Return the flags that ``options`` inherits from ``cls``, without its own."""
    return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _recipe(config: Any, overrides: dict[str, str]) -> Recipe:
    if config is None:
        raise ConfigError("no --config is given; for example --config=digits")
    return load_recipe(config, overrides)


def _value(name: str, text: str | None, words: Iterator[str]) -> str:
    value = next(words, None) if text is None else text
    if value is None:
        raise ConfigError(f"--{name} has no value; write --{name}=VALUE")
    return value


def _field(name: str, text: str | None, words: Iterator[str], fields: dict[str, Any]) -> tuple[str, Any]:
    """Return the field that a flag sets, and its value."""
    if name not in fields and name.startswith("no") and fields.get(name[2:]) is bool:
        require(text is None, f"--{name} takes no value; it is given {text!r}")
        return name[2:], False
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=1)
        advice = f"did you mean --{close[0]}?" if close else f"accepted: {', '.join(f'--{field}' for field in fields)}"
        raise ConfigError(f"flag --{name} does not exist; {advice}")
    if fields[name] is bool:
        accepted = {"true": True, "1": True, "false": False, "0": False}
        require(text is None or text.lower() in accepted, f"--{name} is {text!r}; accepted: true, false")
        return name, text is None or accepted[text.lower()]
    return name, _convert(name, _value(name, text, words), fields[name])


def _convert(name: str, text: str, hint: Any) -> Any:
    """Return ``text`` as the type of a field."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is Annotated:
        return convert(_convert(name, text, typing.get_args(hint)[0]), hint, f"--{name}")
    if typing.get_origin(hint) is tuple:
        return (_convert(name, text, typing.get_args(hint)[0]),)
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        require(text in choices, f"--{name} is {text!r}; accepted: {', '.join(choices)}")
        return text
    kinds = {int: "a whole number", float: "a number"}
    if hint not in kinds:
        return text
    try:
        # Python also accepts digits of other scripts and 1_000, which are typing errors here.
        require(text.isascii() and "_" not in text, "")
        return hint(text)
    except (ValueError, ConfigError):
        raise ConfigError(f"--{name} is {text!r}; it must be {kinds[hint]}") from None


def help_text(cls: type, usage: str, description: str) -> str:
    """Return what ``--help`` prints: usage, description, and every field of ``cls`` with its text and default."""
    lines = [usage, "", description.strip(), "", "options:"]
    # The flags of the program itself come before those that it inherits.
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in cls.__annotations__):
        hint = typing.get_type_hints(cls)[field.name]
        about = field.metadata.get("help", "").replace("{names}", ", ".join(names()))
        several = " Several may be given." if typing.get_origin(hint) is tuple else ""
        default = "" if field.default in (None, "", (), False, dataclasses.MISSING) else f" Default: {field.default}."
        flag = f"--[no]{field.name}" if hint is bool else f"--{field.name}={field.name.upper()}"
        lines.append(f"  {flag}")
        lines += textwrap.wrap(about + several + default, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
