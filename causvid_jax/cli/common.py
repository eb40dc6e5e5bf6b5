"""What every program shares: the ``--config`` flag, one-sentence errors, the compilation cache, start-up logging."""

import contextlib
import dataclasses
import importlib.util
import logging as python_logging
import os
import pathlib
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from causvid_jax.config import ConfigError, Recipe, RunError, check_field, from_config_dict, require
from causvid_jax.models import attention

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


class _RecipeParser(flags.ArgumentParser):
    """``file.py`` or ``file.py:arg`` as a ConfigDict with every field of :class:`Recipe`, so that all can be set."""

    def parse(self, path: str) -> ml_collections.ConfigDict:
        values = ml_collections.ConfigDict(dataclasses.asdict(load_recipe_file(path)))
        return values.lock()


def define_config_flag(name: str = "config") -> flags.FlagHolder:
    """The ``--config=configs/RECIPE.py[:arg]`` flag; fields are set by ``--config.group.field=value``."""
    holder = config_flags.DEFINE_config_file(name, None, "Recipe file, for example configs/digits.py.")
    flags.FLAGS[name].parser = _RecipeParser()
    return holder


def load_recipe_file(path: str) -> Recipe:
    """The validated recipe of ``file.py`` or ``file.py:arg``: what its ``get_config`` returns.

    Raises:
        ConfigError: no such file, one that does not run, one without ``get_config``, or an impossible recipe.
    """
    file, *args = path.split(":", 1)
    require(pathlib.Path(file).is_file(), f"config file {file} does not exist")
    spec = importlib.util.spec_from_file_location(f"recipe_{pathlib.Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config file {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        require(hasattr(module, "get_config"), f"config file {file} has no get_config function")
        values = module.get_config(*args)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"config file {path} cannot be run: {type(error).__name__}: {_line(error)}") from error
    return from_config_dict(values)


def load_recipe(config_flag: flags.FlagHolder) -> Recipe:
    """The recipe given by the flag of :func:`define_config_flag`, command-line fields applied, validated again."""
    values = config_flag.value
    require(values is not None, f"no --{config_flag.name} is given; for example --{config_flag.name}=configs/digits.py")
    return from_config_dict(values)


def writable_workdir(workdir: str) -> pathlib.Path:
    """``workdir``, made if need be; a ConfigError if nothing can be written there."""
    path = pathlib.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--workdir {workdir} cannot be made: {error.strerror}") from error
    require(os.access(path, os.W_OK | os.X_OK), f"--workdir {workdir} cannot be written; it needs write permission")
    return path


def check_overrides(arguments: Sequence[str], name: str = "config") -> None:
    """Refuse ``--config.a.b`` where ``a.b`` is no field of :class:`Recipe`, naming the nearest that is."""
    for argument in arguments:
        match = re.match(rf"--?(?:no)?{name}\.([^=]*)", argument)
        if match:
            check_field(match.group(1))


def _parse_flags(arguments: Sequence[str]) -> list[str]:
    """absl's flag parsing with every failure as a ConfigError."""
    ours = arguments[1 : list(arguments).index("--")] if "--" in arguments else arguments[1:]
    check_overrides(ours)
    try:
        rest = flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_line(error)) from error
    require(len(rest) == 1, f"unexpected argument {rest[-1]!r}; every option is --name=value")
    return rest


def run(main: Callable[[], None]) -> None:
    """Run ``main`` under absl: flags, logging, exit status.

    A :class:`ConfigError`, from a flag or from inside ``main``, becomes one sentence on stderr and status 2, a
    :class:`RunError` one and status 1; Ctrl-C becomes one line and status 130. Anything else is a defect and keeps its
    traceback.
    """

    def guarded(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except ConfigError as error:
            _finish(f"error: {_line(error)}", BAD_INPUT)
        except RunError as error:
            _finish(f"error: {_line(error)}", FAILED)
        except KeyboardInterrupt:
            _finish("stopped by Ctrl-C", INTERRUPTED)

    # At INFO JAX reports every accelerator that is not there.
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)
    app.run(lambda _: guarded(main), flags_parser=lambda arguments: guarded(lambda: _parse_flags(arguments)))


def _finish(message: str, status: int) -> typing.NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def _line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


def enable_compilation_cache() -> str | None:
    """Keep compiled programs on disk between runs; the directory in use, or None.

    ``JAX_COMPILATION_CACHE_DIR`` (JAX's own) wins, then ``CAUSVID_JAX_CACHE`` (empty: no cache), then
    ``~/.cache/causvid_jax``. A directory that cannot be written only costs the time to compile.
    """
    directory = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not directory:
        directory = os.environ.get("CAUSVID_JAX_CACHE", str(pathlib.Path.home() / ".cache" / "causvid_jax"))
        if not directory:
            return None
        try:
            os.makedirs(directory, exist_ok=True)
        except OSError as error:
            logging.info("No compilation cache: %s cannot be made (%s).", directory, error.strerror)
            return None
        if not os.access(directory, os.W_OK):
            logging.info("No compilation cache: %s cannot be written.", directory)
            return None
        jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return directory


def log_start(recipe: Recipe) -> None:
    """Log once what was chosen: versions, devices, attention backends, compute types."""
    devices = jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    logging.info("JAX %s, %d x %s (%s).", jax.__version__, len(devices), kinds, jax.default_backend())
    for role in ("teacher", "student"):
        net = getattr(recipe, role)
        logging.info(
            "%s: %d layers of width %d, %s attention, %s.",
            role,
            net.num_layers,
            net.dim,
            attention.resolve(net.attention, net.dtype),
            net.dtype,
        )


def check_output(path: str | None, suffixes: Sequence[str], flag: str = "output") -> pathlib.Path:
    """``path`` if a file can be written there, before any compute; parent directories are made.

    Raises:
        ConfigError: no path, a suffix not in ``suffixes``, a directory, or a place that cannot be written.
    """
    if not path:
        raise ConfigError(f"no --{flag} is given; it must be a file that ends in {' or '.join(suffixes)}")
    target = pathlib.Path(path)
    require(target.suffix in suffixes, f"--{flag} is {path!r}; it must end in {' or '.join(suffixes)}")
    require(not target.is_dir(), f"--{flag} {path} is a directory; it must be a file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--{flag} {path} cannot be written: {target.parent}: {error.strerror}") from error
    place = target if target.exists() else target.parent
    require(os.access(place, os.W_OK), f"--{flag} {path} cannot be written: no permission for {place}")
    return target
