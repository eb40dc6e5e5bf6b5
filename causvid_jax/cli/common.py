"""Shared parts of all programs: parsing, one-sentence errors with an exit status, compilation cache, log.

A program is a module with ``Options``, a dataclass whose fields are its flags, and ``main(options)``. Modules import
JAX inside ``main``, so that ``--help`` and a refused flag answer at once.
"""

import contextlib
import importlib
import logging as python_logging
import os
import pathlib
import signal
import sys
import typing
from collections.abc import Iterator, Sequence

from causvid_jax.cli.options import help_text, parse
from causvid_jax.cli.stopping import Stopped, stoppable
from causvid_jax.config import ConfigError, Recipe, RunError, require
from causvid_jax.config.files import reason

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130


def call(program: str, arguments: Sequence[str]) -> None:
    """Run a program in this process.

    Raises:
        ConfigError: a flag or an input that cannot work.
        RunError: a run that cannot continue.
    """
    module = importlib.import_module(f"causvid_jax.cli.{program}")
    if any(word in ("--help", "-h", "-help") for word in arguments):
        print(help_text(module.Options, f"causvid {program} [--flag=value ...]", module.__doc__ or ""))
        return
    options = parse(module.Options, arguments)
    prepare_logging()
    if not hasattr(options, "coordinator"):  # programs of many processes first find each other
        quiet_libtpu()
    module.main(options)


def run(program: str, arguments: Sequence[str]) -> None:
    """Run a program as a process: a ConfigError becomes one sentence on stderr and status 2, a RunError status 1.

    Ctrl-C becomes one line and status 130, SIGTERM status 143 and SIGHUP status 129. Open files are first finished or
    removed. Any other exception is a bug and keeps its traceback.
    """
    try:
        with stoppable():
            call(program, arguments)
            sys.stdout.flush()
    except ConfigError as error:
        _finish(f"error: {reason(error)}", BAD_INPUT)
    except RunError as error:
        _finish(f"error: {reason(error)}", FAILED)
    except Stopped as stopped:
        _finish(f"stopped by {stopped.number.name}", 128 + stopped.number)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except KeyboardInterrupt:
        _finish("stopped by Ctrl-C", INTERRUPTED)


@contextlib.contextmanager
def parts() -> Iterator[None]:
    """End the program with status 143 if SIGTERM ends a training in the block: other parts are still to do.

    A single training ends with status 0 then, because the scheduler that stopped it starts it again.
    """
    from causvid_jax.training.preemption import Terminated

    try:
        yield
    except Terminated:
        raise Stopped(signal.SIGTERM) from None


def _finish(message: str, status: int) -> typing.NoReturn:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def prepare_logging() -> None:
    """Show our log on stderr and silence the messages of XLA, JAX and tensorflow-datasets below errors."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's C++ log
    os.environ.setdefault("TQDM_DYNAMIC_NCOLS", "1")
    from absl import flags, logging

    flags.FLAGS.mark_as_parsed()  # libraries define absl flags; all keep their defaults
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_is_ours)
    # At INFO JAX reports every accelerator that it does not find.
    python_logging.getLogger("jax").setLevel(python_logging.WARNING)


def _is_ours(record: python_logging.LogRecord) -> bool:
    """Return whether to show a record: ours, or an error of a library that shares absl's log."""
    return record.levelno >= python_logging.ERROR or "tensorflow_datasets" not in record.pathname


def writable_workdir(workdir: str | None, flag: str = "--workdir") -> pathlib.Path:
    """Create the folder ``workdir`` of the flag ``flag`` if necessary and return its path.

    Raises:
        ConfigError: no path, or it cannot be written.
    """
    if not workdir:
        raise ConfigError(f"no {flag} is given; it must be a directory for data and weights")
    path = pathlib.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {workdir} cannot be made: {error.strerror}") from error
    require(os.access(path, os.W_OK | os.X_OK), f"{flag} {workdir} cannot be written; it needs write permission")
    return path


def check_output(path: str | None, suffixes: Sequence[str], flag: str = "output") -> pathlib.Path:
    """Return ``path`` if a file can be written there; parent directories are made.

    ``flag`` is the name of the flag in messages.

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
    writable = target if target.exists() else target.parent
    require(os.access(writable, os.W_OK), f"--{flag} {path} cannot be written: no permission for {writable}")
    return target


NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
"""Variables with which libtpu does not search for a TPU; any existing type is accepted."""


def quiet_libtpu(devices: str | os.PathLike = "/dev") -> None:
    """Keep libtpu (extra ``tpu``) from reporting on stderr that a machine has no TPU.

    A host of a TPU has ``/dev/accel*`` or ``/dev/vfio``; its environment and its messages stay unchanged. Call this
    before JAX looks for devices, and after the processes of a run have found each other.
    """
    folder = pathlib.Path(devices)
    if not any(folder.glob("accel*")) and not (folder / "vfio").exists():
        for name, value in NO_TPU.items():
            os.environ.setdefault(name, value)


def enable_compilation_cache() -> str | None:
    """Keep compiled programs on disk between runs; return the directory, or None.

    The directory is ``JAX_COMPILATION_CACHE_DIR`` (JAX's own), else ``CAUSVID_JAX_CACHE`` (empty: no cache), else
    ``~/.cache/causvid_jax``. A directory that cannot be written only costs the time to compile.
    """
    quiet_libtpu()
    import jax
    from absl import logging

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
    """Log versions, devices, attention backends and compute types."""
    import jax
    from absl import logging

    from causvid_jax.models import attention

    devices = jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in devices}))
    logging.info("JAX %s, %d x %s (%s).", jax.__version__, len(devices), kinds, jax.default_backend())
    for role in ("teacher", "student"):
        net = getattr(recipe, role)
        kernel = attention.resolve(net.attention, net.dtype)
        dtype = f"{net.dtype}, linear layers in int8" if net.linear == "int8" else net.dtype
        logging.info("%s: %d layers of width %d, %s attention, %s.", role, net.num_layers, net.dim, kernel, dtype)
