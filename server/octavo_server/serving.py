"""Run one replica from start to exit: bind, load, serve, drain, leave with a code that says how it went."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from typing import TypeVar

import grpc
import uvicorn
import uvloop

from octavo_engine.client import EngineClient
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError, OctavoError
from octavo_server.app import build_app
from octavo_server.http_protocol import BoundedHeadProtocol
from octavo_server.logs import configure_logging
from octavo_server.oip.grpc_server import start_grpc_server
from octavo_server.oip.repository import Repository
from octavo_server.replica import Replica, TokenizerLoader
from octavo_server.settings import ServeSettings

T = TypeVar("T")
EngineFactory = Callable[[EngineConfig], EngineClient]

# How long an engine may stay dead or hung before the process gives up, so that whoever supervises it starts anew.
UNHEALTHY_EXIT_S = 30.0
ENGINE_SHUTDOWN_S = 5.0
_HEALTH_INTERVAL_S = 1.0
_PROGRESS_INTERVAL_S = 0.5
_BACKLOG = 2_048
_KEEP_ALIVE_S = 75  # longer than the idle time of common load balancers

logger = logging.getLogger("octavo.server")


def run_replica(settings: ServeSettings, make_engine: EngineFactory, load_tokenizer: TokenizerLoader) -> int:
    """Serve until a signal or a failure; returns the exit code of the process."""
    configure_logging(settings.log_level, settings.log_format)
    logger.info("settings:\n%s", settings.describe())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings, make_engine, load_tokenizer))


async def _run(settings: ServeSettings, make_engine: EngineFactory, load_tokenizer: TokenizerLoader) -> int:
    try:
        listener = _bind(settings.host, settings.port)
    except ConfigError as error:
        return _fail(str(error))
    signals = _Signals()
    try:
        replica = Replica(settings, make_engine(settings.engine_config()), load_tokenizer)
        repository = Repository(replica)
        grpc_server = await _start_grpc(replica, repository)
    except ConfigError as error:
        listener.close()
        return _fail(str(error))
    server = _HttpServer(_http_config(replica, repository))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    logger.info("listening on http://%s:%d", *listener.getsockname()[:2])
    try:
        return await _live(replica, repository, signals)
    finally:
        server.should_exit = True
        if grpc_server is not None:
            await grpc_server.stop(0.0)
        await replica.close(0.0 if signals.second.is_set() else ENGINE_SHUTDOWN_S)
        server.force_exit = signals.second.is_set()
        await serving


async def _start_grpc(replica: Replica, repository: Repository) -> grpc.aio.Server | None:
    settings = replica.settings
    if not settings.grpc_port:
        return None
    server, port = await start_grpc_server(replica, repository, settings.host, settings.grpc_port)
    logger.info("listening on grpc://%s:%d", settings.host, port)
    return server


async def _live(replica: Replica, repository: Repository, signals: _Signals) -> int:
    """Load, serve, drain; returns the exit code."""
    loading = asyncio.create_task(_load(replica, repository))
    failure = await _first(loading, signals.first)
    if signals.first.is_set():
        return 0
    if failure is not None:
        replica.lifecycle.fail(failure)
        return _fail(failure)
    death = await _first(asyncio.create_task(_watch_health(replica)), signals.first)
    if death is not None:
        return _fail(death)
    return await _drain(replica, signals)


async def _drain(replica: Replica, signals: _Signals) -> int:
    settings = replica.settings
    # Nobody sends traffic through a load balancer to a server that a person ends from the keyboard.
    propagation_s = 0.0 if signals.received == signal.SIGINT else settings.drain_propagation
    logger.info(
        "draining: %d requests in flight, at most %g s", replica.lifecycle.num_in_flight,
        propagation_s + settings.drain_timeout,
    )  # fmt: skip
    draining = asyncio.create_task(replica.lifecycle.drain(propagation_s, settings.drain_timeout))
    complete = await _first(draining, signals.second)
    if complete is None:
        logger.warning("second signal: leaving at once")
        return 128 + signals.received
    logger.info("drained" if complete else "drain timed out; the remaining requests were ended with an error")
    return 0


async def _load(replica: Replica, repository: Repository) -> str | None:
    """Start the engine while telling where it stands; returns what went wrong, in one line."""
    started_at = time.monotonic()
    reporting = asyncio.create_task(_report_progress(replica))
    try:
        await repository.load_files()
        await replica.start()
    except OctavoError as error:
        return " ".join(str(error).split()) or type(error).__name__
    finally:
        reporting.cancel()
    info = replica.served.info
    logger.info(
        "ready in %.1f s: %s (%s, %s, %s on %s), context %d, %d KV blocks of %d tokens",
        time.monotonic() - started_at, replica.served.name, info.architecture, info.dtype, info.quantization,
        info.device, info.max_model_len, info.kv_blocks_total, info.kv_block_size,
    )  # fmt: skip
    return None


async def _report_progress(replica: Replica) -> None:
    """Log each phase once and then every tenth of it."""
    shown: tuple[str, int] | None = None
    while True:
        progress = replica.engine.progress
        if progress is not None:
            state = (progress.phase, int(progress.fraction * 10))
            if state != shown:
                logger.info("loading: %s %.0f %% %s", progress.phase, progress.fraction * 100, progress.detail)
                shown = state
        await asyncio.sleep(_PROGRESS_INTERVAL_S)


async def _watch_health(replica: Replica) -> str:
    """Return the problem once the engine has been unwell for too long."""
    unwell_since: float | None = None
    while True:
        problem = replica.health_problem()
        if problem is None:
            unwell_since = None
        elif unwell_since is None:
            unwell_since = time.monotonic()
            logger.error("engine unwell: %s", problem)
        elif time.monotonic() - unwell_since > UNHEALTHY_EXIT_S:
            return problem
        await asyncio.sleep(_HEALTH_INTERVAL_S)


async def _first(work: asyncio.Task[T], event: asyncio.Event) -> T | None:
    """The task's result, or None when `event` came first (the task is then cancelled)."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((work, waiting), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        return None
    finally:
        waiting.cancel()


class _Signals:
    """SIGTERM and SIGINT: the first asks to drain, the second to leave at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.received = signal.SIGTERM
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.first.is_set():
            self.second.set()
            return
        self.received = number
        self.first.set()


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handling: the replica decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _http_config(replica: Replica, repository: Repository) -> uvicorn.Config:
    return uvicorn.Config(
        build_app(replica, repository),
        http=BoundedHeadProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=2,
    )


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)  # at once: callers wait a moment instead of being refused
    except OSError as error:
        listener.close()
        raise ConfigError(f"--port: cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def _fail(message: str) -> int:
    sys.stderr.write(f"octavo serve: {message}\n")
    sys.stderr.flush()
    return 1
