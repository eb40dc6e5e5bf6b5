"""Check configuration fields: types, closed choices (``Literal``) and bounds (``Annotated``).

The annotation of a field of a :class:`Config` defines what the field accepts::

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: Annotated[float, Bounds(above=0)] = 1e-4

:func:`convert` checks one value and :func:`build` checks a whole group. Their error messages are one sentence with the
field's path, the value and what is accepted.
"""

import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar

from causvid_jax.config.errors import ConfigError, require


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits of a number. ``least`` and ``most`` are accepted themselves, ``above`` and ``below`` are not.

    ``multiple`` is for whole numbers: they must be multiples of it. NaN and infinity are never accepted.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    multiple: int = 1

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple == 1 or value % self.multiple == 0)
        )

    def __str__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        parts = [f"{name} {limit:.10g}" for name, limit in limits.items() if limit is not None]
        words = " and ".join(parts) or "finite numbers"
        return words + (f", multiples of {self.multiple}" if self.multiple > 1 else "")


LARGE = 10**9
"""Upper limit of counts. A larger number is most likely a typing error."""

Count = Annotated[int, Bounds(least=1, most=LARGE)]
CountOrZero = Annotated[int, Bounds(least=0, most=LARGE)]
Few = Annotated[int, Bounds(least=1, most=1000)]
Many = Annotated[int, Bounds(least=1, most=10**6)]
ManyOrZero = Annotated[int, Bounds(least=0, most=10**6)]
BatchSize = Annotated[int, Bounds(least=1, most=4096)]
Seed = Annotated[int, Bounds(least=0, most=2**31 - 1)]
Size = Annotated[int, Bounds(least=1, most=2**22)]
Positive = Annotated[float, Bounds(above=0)]
NotNegative = Annotated[float, Bounds(least=0)]
Probability = Annotated[float, Bounds(least=0, most=1)]


class Config:
    """Base of the configuration dataclasses. Creating one checks every field, and raises a ConfigError.

    ``label`` is the name of the group in these error messages. Those of :func:`build` have the field's whole path.
    """

    label: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            if dataclasses.is_dataclass(value):
                continue
            checked = convert(value, hint, join(self.label, name))
            if checked is not value:
                object.__setattr__(self, name, checked)

    def _check_effect(self, names: Iterable[str], has_effect: bool, where: str, instead: str) -> None:
        """Refuse fields without an effect: unless ``has_effect``, each of ``names`` must have its default.

        ``where`` names the settings under which it has none, and ``instead`` those under which it has one.
        """
        for name in names:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default  # type: ignore[attr-defined]
            path = join(self.label, name)
            require(
                has_effect or value == default,
                f"{path} is {value!r} with {where}, where it has no effect; use {instead}, or {name} {default!r}",
            )


def check_bounds(options: Any) -> None:
    """Check the fields of the dataclass ``options`` that have :class:`Bounds` in their annotation.

    Raises:
        ConfigError: a value out of bounds. The message names the field as a flag.
    """
    for name, hint in field_types(type(options)).items():
        if typing.get_origin(hint) is Annotated:
            convert(getattr(options, name), hint, f"--{name}")


def join(path: str, name: str) -> str:
    """Return ``"path.name"``, or ``name`` if ``path`` is empty."""
    return f"{path}.{name}" if path else name


def flat_fields(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts by dotted path: ``{"a": {"b": 1}}`` gives ``{"a.b": 1}``."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for name, inner in tree.items() for k, v in flat_fields(inner, join(path, name)).items()}


def changed_fields(before: Any, now: Any) -> dict[str, str]:
    """Return the fields that two trees of :func:`flat_fields` have with other values: name to "name 100, now 200"."""
    old, new = flat_fields(before), flat_fields(now)
    names = [name for name in old if name in new and old[name] != new[name]]
    return {name: f"{name} {old[name]!r}, now {new[name]!r}" for name in names}


_TYPES: dict[type, dict[str, Any]] = {}


def field_types(cls: type) -> dict[str, Any]:
    """Return the annotation of every field of a dataclass, with its bounds, by name."""
    if cls not in _TYPES:
        hints = typing.get_type_hints(cls, include_extras=True)
        _TYPES[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _TYPES[cls]


def suggest(word: str, accepted: Iterable[str], prefix: str = "") -> str:
    """Return ``did you mean 'x'?`` for the nearest accepted word, or ``accepted: ...`` if none is near.

    ``prefix`` is put before the nearest word, to complete a path.
    """
    words = list(accepted)
    close = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {prefix + close[0]!r}?" if close else f"accepted: {', '.join(words)}"


def convert(value: Any, hint: Any, path: str) -> Any:
    """Return ``value`` as the type ``hint``.

    Lists become tuples and whole numbers become floats where the type asks for them; nothing else is converted.

    Raises:
        ConfigError: another type, a choice that does not exist, or a number out of bounds.
    """
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else build(typing.cast(type, hint), value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        number = convert(value, arguments[0], path)
        for bounds in arguments[1:]:
            require(number in bounds, f"{path} is {number!r}; accepted: {bounds}")
        return number
    if origin is typing.Literal:
        is_choice = isinstance(value, str) and value in arguments
        require(is_choice, f"{path} is {value!r}; accepted: {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        require(isinstance(value, (tuple, list)), f"{path} is {value!r}; it must be a sequence")
        items = [arguments[0]] * len(value) if arguments[1:] == (Ellipsis,) else list(arguments)
        require(len(items) == len(value), f"{path} has {len(value)} entries; it must have {len(items)}")
        return tuple(convert(v, h, f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, items, strict=True)))
    if origin is types.UnionType or origin is typing.Union:
        own = [choice for choice in arguments if choice is bool] if isinstance(value, bool) else []
        return value if own else convert(value, next(choice for choice in arguments if choice is not bool), path)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return value if isinstance(value, float) else float(value)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return value if isinstance(value, int) else int(value)
    require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{path} is {value!r}; it must be of type {getattr(hint, '__name__', hint)}",
    )
    return value


def build(cls: type, values: Any, path: str = "", renamed: Mapping[str, str] | None = None) -> Any:
    """Return the dataclass ``cls`` with the fields of ``values``.

    Args:
        cls: a :class:`Config`.
        values: field name to value; a group of fields is a mapping or a ``ConfigDict``.
        path: dotted path of the group, "" for the whole recipe.
        renamed: old path of a field to the new name of its last part. The error of an old field names the new one.

    Raises:
        ConfigError: an unknown, renamed or missing field, or a value that :func:`convert` refuses.
    """
    values = values.to_dict() if hasattr(values, "to_dict") else values
    require(isinstance(values, Mapping), f"{path} is {values!r}; it must be a group of fields")
    types_of = field_types(cls)
    converted = {}
    for name, value in values.items():
        inner = join(path, name)
        check_renamed(inner, renamed)
        if name not in types_of:
            raise ConfigError(f"config field {inner!r} does not exist; {suggest(name, types_of, join(path, ''))}")
        hint = types_of[name]
        if dataclasses.is_dataclass(hint):
            converted[name] = build(typing.cast(type, hint), value, inner, renamed)
        else:
            converted[name] = convert(value, hint, inner)
    for field in dataclasses.fields(cls):
        is_missing = field.name not in converted and field.default is field.default_factory is dataclasses.MISSING
        require(not is_missing, f"config field {join(path, field.name)!r} is missing")
    return cls(**converted)


def check_renamed(path: str, renamed: Mapping[str, str] | None) -> None:
    """Raise a ConfigError that names the new field if ``path`` is in ``renamed``, as in :func:`build`."""
    if renamed and path in renamed:
        new = f"{path.rsplit('.', 1)[0]}.{renamed[path]}"
        raise ConfigError(f"config field {path!r} was renamed; write {new!r}")


def check_path(cls: type, path: str, renamed: Mapping[str, str] | None = None) -> None:
    """Check that a dotted path is a field of the dataclass ``cls``.

    Raises:
        ConfigError: the field does not exist (the message names the nearest one) or was renamed, as in :func:`build`.
    """
    check_renamed(path, renamed)
    parents: list[str] = []
    hint: Any = cls
    for part in path.split("."):
        require(
            dataclasses.is_dataclass(hint), f"config field {path!r} does not exist: {'.'.join(parents)} is no group"
        )
        names = field_types(hint)
        if part not in names:
            prefix = "".join(f"{parent}." for parent in parents)
            raise ConfigError(f"config field {path!r} does not exist; {suggest(part, names, prefix)}")
        hint = names[part]
        parents.append(part)
