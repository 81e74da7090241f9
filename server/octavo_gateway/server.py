"""Runs a gateway on a socket: start, graceful drain, stop; inside a bigger program or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn

from octavo_gateway.app import Gateway, create_app
from octavo_gateway.errors import ConfigError
from octavo_gateway.http_protocol import bounded_protocol
from octavo_gateway.registry import Registry
from octavo_gateway.settings import GatewaySettings

log = logging.getLogger("octavo.gateway")

START_TIMEOUT_S = 10.0


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: whoever runs the gateway decides when it stops."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class GatewayServer:
    """A gateway listening at `address`. Call `start` and `stop` from one event loop."""

    def __init__(self, settings: GatewaySettings, registry: Registry) -> None:
        self.settings = settings
        self.app: Gateway = create_app(settings, registry)
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._port = settings.port

    @property
    def port(self) -> int:
        """The port it listens on; the real one even where the settings say 0."""
        return self._port

    @property
    def address(self) -> str:
        """Base URL for clients on this machine or network."""
        scheme = "https" if self.settings.tls_certificate else "http"
        host = "127.0.0.1" if self.settings.host in ("0.0.0.0", "::", "") else self.settings.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self._port}"

    async def start(self) -> None:
        """Listen. Raises `ConfigError` when the address cannot be bound."""
        listener = self._bind()
        self._port = listener.getsockname()[1]
        self._server = _Server(self._uvicorn_config())
        await self.app.start()
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        async with asyncio.timeout(START_TIMEOUT_S):
            await self._server.listening.wait()
        log.info("gateway listens at %s", self.address)

    async def wait(self) -> None:
        """Return when the server has stopped."""
        if self._serving is not None:
            await asyncio.shield(self._serving)

    async def stop(self, drain_timeout_s: float | None = None) -> None:
        """Drain: say not ready, serve on for the propagation time, refuse new requests, finish the running ones."""
        if self._server is None or self._serving is None:
            return
        timeout_s = self.settings.drain_timeout if drain_timeout_s is None else drain_timeout_s
        clean = await self.app.drain(timeout_s, propagation_s=self.settings.drain_propagation)
        if not clean:
            log.warning("gateway: some requests did not finish within %g s and were ended", timeout_s)
        self._server.should_exit = True
        await self._serving
        await self.app.close()
        self._server = self._serving = None

    def _bind(self) -> socket.socket:
        host, port = self.settings.host, self.settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"port: cannot listen on {host}:{port} ({error.strerror}); choose another port"
            ) from error
        listener.setblocking(False)
        return listener

    def _uvicorn_config(self) -> uvicorn.Config:
        return uvicorn.Config(
            self.app,
            http=bounded_protocol(self.settings.max_header_bytes, self.settings.header_timeout),
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            backlog=4_096,
            timeout_graceful_shutdown=5,
            ssl_certfile=self.settings.tls_certificate,
            ssl_keyfile=self.settings.tls_key,
        )
