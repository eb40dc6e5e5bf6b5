"""Find and run recipe files, by name or by path, and set fields of their recipes. Imports no JAX."""

import ast
import dataclasses
import difflib
import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Mapping
from typing import Any

from causvid_jax.config.errors import ConfigError, require
from causvid_jax.config.recipe import Recipe, check_field, from_config_dict

CONFIG_HELP = (
    "The recipe: a name ({names}) or a Python file with get_config(), which is run: use files that you trust. "
    "digits:two calls get_config('two'). --config.GROUP.FIELD=VALUE sets a field, for example "
    "--config.video.frames=41; a tuple as "
    '"--config.diffusion.denoising_timesteps=(1000.,500.)".'
)

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def folder() -> pathlib.Path:
    """Return the folder of the package's recipes: ``configs/`` of a clone, ``causvid_jax/configs/`` where installed."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def names() -> list[str]:
    """Return the names of the package's recipes, sorted."""
    return sorted(path.stem for path in folder().glob("*.py") if not path.stem.startswith("_"))


def load_recipe(config: str | os.PathLike, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Return the validated recipe of a name or a file, with fields set from text. The file is run as Python code.

    Args:
        config: ``digits`` or ``my/recipe.py``; ``digits:two`` and ``my/recipe.py:two`` call ``get_config("two")``.
        overrides: dotted field to its value as Python writes it, such as ``{"video.frames": "81"}``.

    Raises:
        ConfigError: no such recipe, a file that does not run or has no ``get_config``, an unknown field, a value that
            is not accepted, or groups that do not fit each other.
    """
    file, *arguments = os.fspath(config).split(":", 1)
    path = _find(file)
    module = _run(path, file)
    require(hasattr(module, "get_config"), f"config file {file} has no get_config function")
    try:
        values = module.get_config(*arguments)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"config {config} cannot be run: {_describe(error)}") from error
    recipe = from_config_dict(values)
    return override(recipe, overrides) if overrides else recipe


def override(recipe: Recipe, overrides: Mapping[str, str]) -> Recipe:
    """Return ``recipe`` with fields set from text; ``overrides`` and errors as in :func:`load_recipe`."""
    values = dataclasses.asdict(recipe)
    for field, text in overrides.items():
        check_field(field)
        *groups, name = field.split(".")
        group = values
        for part in groups:
            group = group[part]
        old = group[name]
        require(not isinstance(old, dict), f"config field {field!r} is a group; set one of its fields")
        group[name] = _parse(text, old)
    return from_config_dict(values)


def _parse(text: str, old: Any) -> Any:
    """Parse ``text`` as the value of a field whose value was ``old``."""
    if isinstance(old, str):
        return text
    if isinstance(old, bool) and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # refused with the field's name and type


def _find(file: str) -> pathlib.Path:
    path = pathlib.Path(file)
    if path.is_file():
        return path
    known = names()
    if file in known:
        return folder() / f"{file}.py"
    close = difflib.get_close_matches(path.stem, known, n=1)
    advice = f"did you mean {close[0]!r}?" if close else f"accepted: a file, or one of {', '.join(known)}"
    raise ConfigError(f"config file {file} does not exist; {advice}" if file else f"the config is empty; {advice}")


def _run(path: pathlib.Path, name: str) -> types.ModuleType:
    """Run a recipe file as a module of its folder as a package, so that it can import its neighbours by ``.``."""
    package = f"_recipes_{abs(hash(path.parent.resolve())):x}"
    if package not in sys.modules:
        parent = types.ModuleType(package)
        parent.__path__ = [str(path.parent.resolve())]
        sys.modules[package] = parent
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"config file {name} cannot be run: {_describe(error)}") from error
    return module


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def option(default: Any, description: str) -> Any:
    """Return a dataclass field that becomes a flag of a program; ``description`` is its line of ``--help``."""
    return dataclasses.field(default=default, metadata={"help": description})
