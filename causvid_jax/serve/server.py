"""Serve an engine until a signal ends the process."""

import contextlib
import logging
import signal
import socket as sockets
import threading
from collections.abc import Iterator

import uvicorn

from causvid_jax.config import ConfigError, RunError
from causvid_jax.serve.app import create_app
from causvid_jax.serve.engine import Engine
from causvid_jax.serve.settings import Settings
from causvid_jax.serve.transport import PatientProtocol

DRAIN_SECONDS = 10
CONNECTIONS = 512


def listen(settings: Settings) -> sockets.socket:
    """Return a socket that listens at the address of ``settings``.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family = sockets.AF_INET6 if ":" in settings.host else sockets.AF_INET
        return sockets.create_server((settings.host, settings.port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(f"cannot listen at {settings.host}:{settings.port}: {error.strerror}") from error


def configuration(engine: Engine) -> uvicorn.Config:
    """Return uvicorn's configuration of the application."""
    return uvicorn.Config(
        create_app(engine),
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        http=PatientProtocol,
        ws="websockets-sansio",
        ws_max_size=engine.settings.message_bytes,
        ws_per_message_deflate=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )


def serve(engine: Engine, listener: sockets.socket) -> None:
    """Serve at ``listener`` until SIGTERM, SIGHUP or Ctrl-C; then close connections and finish recordings.

    Raises:
        ConfigError: weights or a program that are missing or do not fit.
        RunError: loading or compiling failed in another way.
    """
    server = _Server(configuration(engine))
    threading.Thread(target=_stop_after_failed_load, args=(engine, server), daemon=True).start()
    server.run(sockets=[listener])
    if engine.failure and not engine.ready.is_set():
        kind, _, message = engine.failure.partition(": ")
        raise ConfigError(message) if kind == "ConfigError" else RunError(engine.failure)


class _Server(uvicorn.Server):
    """uvicorn's server; it stops in order on SIGHUP (a terminal is closed), too, unless that is ignored (``nohup``)."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():  # raises the signals again at its end
            before = signal.getsignal(signal.SIGHUP)
            takes = before != signal.SIG_IGN and threading.current_thread() is threading.main_thread()
            if takes:
                signal.signal(signal.SIGHUP, self.handle_exit)
            try:
                yield
            finally:
                if takes:
                    signal.signal(signal.SIGHUP, before)


def _stop_after_failed_load(engine: Engine, server: uvicorn.Server) -> None:
    while not engine.ready.wait(0.1) and not server.should_exit:
        if server.started and engine.failure:
            server.should_exit = True
