"""Serve a live film and a page that controls it: ``causvid serve``, then open the address that it prints.

The page changes the prompt while the film runs, starts from pictures, follows a video or the camera, keeps snapshots
and forks them, records and replays. The same server has ``/v1/videos`` (in the shape of OpenAI's video API), the
WebSocket ``/v1/stream``, ``/healthz``, ``/readyz`` and ``/metrics``. It needs the extra ``serve``; docs/serving.md
describes it.
"""

import dataclasses
import functools
import importlib.util
import os

from causvid_jax.cli import common
from causvid_jax.cli.options import option
from causvid_jax.config import ConfigError, Recipe, published
from causvid_jax.config.recipes import CONFIG_HELP
from causvid_jax.serve.settings import TOKEN, Settings


@dataclasses.dataclass(frozen=True)
class Options(Settings):
    """The flags."""

    config: Recipe = option("digits", CONFIG_HELP)
    checkpoint: str | None = option(None, "Weights, as in causvid sample. Default: those of the package.")
    student: str | None = option(None, "The student's weights, instead of those in --checkpoint.")
    vae: str | None = option(None, "The VAE's weights, instead of those in --checkpoint.")
    taehv: str | None = option(None, "The tiny decoder's weights, instead of those in --checkpoint.")
    program: str | None = option(None, "A file of compile --stage=serve, to run instead of tracing the model.")
    config_of = staticmethod(published.recipe_of)

    def __post_init__(self) -> None:
        if not self.token:  # an address that others can reach is refused without one
            object.__setattr__(self, "token", os.environ.get(TOKEN, ""))
        super().__post_init__()


def main(options: Options) -> None:
    """Listen, warm up and serve until a signal.

    Raises:
        ConfigError: a missing extra, a recipe whose streams end, more sessions than fit, or an address that is in use.
    """
    try:
        from causvid_jax.serve import server
        from causvid_jax.serve.engine import Engine
    except ModuleNotFoundError as error:
        raise ConfigError(f"causvid serve needs {error.name}; install it: pip install 'causvid_jax[serve]'") from error
    if options.webrtc and importlib.util.find_spec("aiortc") is None:
        raise ConfigError("--webrtc needs aiortc; install it: pip install 'causvid_jax[webrtc]'")
    from causvid_jax.analysis import bounds
    from causvid_jax.serve.programs import open_programs, require_endless

    require_endless(options.config)
    bounds.check_server(options.config, options.sessions)
    listener = server.listen(options)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    if common.enable_compilation_cache():
        import jax

        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)  # a start reads them all
    files = {"student": options.student, "vae": options.vae, "taehv": options.taehv}
    load = functools.partial(
        open_programs, options.config, options.checkpoint, files, program=options.program, compiles=True
    )

    # Logs keep what is printed, so a secret of the environment is not.
    token = f"${TOKEN}" if options.token and options.token == os.environ.get(TOKEN) else options.token
    print(f"Loading {options.config.name}. The page: {address}{'#token=' + token if token else ''}", flush=True)
    server.serve(Engine(options.config, load, options), listener)
