"""Runs a gateway on a socket: start, graceful drain, stop; inside a bigger program or as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from octavo_gateway.admin import AdminApi
from octavo_gateway.app import Gateway, create_app
from octavo_gateway.asgi import App
from octavo_gateway.discovery import ApiServer
from octavo_gateway.errors import ConfigError
from octavo_gateway.http_protocol import bounded_protocol
from octavo_gateway.registry import Registry
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.tenancy import TenantDirectory
from octavo_gateway.tenancy.follow import TenantFollower, tenant_follower
from octavo_gateway.usage import Ledger, PriceTable

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

    def __init__(
        self,
        settings: GatewaySettings,
        registry: Registry,
        *,
        directory: TenantDirectory | None = None,
        ledger: Ledger | None = None,
        prices: PriceTable | None = None,
    ) -> None:
        self.settings = settings
        self.app: Gateway = create_app(settings, registry, directory=directory, ledger=ledger, prices=prices)
        self._servers: list[tuple[_Server, asyncio.Task[None]]] = []
        self._own_ledger: Ledger | None = None
        self._tenants: TenantFollower | None = None
        self.following: asyncio.Task[None] | None = None
        self._port = settings.port
        self._admin_port = settings.admin_port
        self._metrics_port = settings.metrics_port

    @classmethod
    def from_settings(
        cls,
        settings: GatewaySettings,
        registry: Registry,
        *,
        prices: PriceTable | None = None,
        api_server: ApiServer | None = None,
    ) -> GatewayServer:
        """A gateway with the tenants and the ledger that its settings name; it closes the ledger when it stops.

        Tenants are followed while it runs; `following` is that task, which ends only by an error. Raises `ConfigError`
        or `LedgerError`.
        """
        tenants = tenant_follower(settings, api_server)
        directory = None if tenants is None else tenants.load()
        ledger = None
        if settings.ledger:
            ledger = Ledger(Path(settings.ledger), settings.ledger_url, spool_bytes=settings.ledger_spool_bytes)
        server = cls(settings, registry, directory=directory, ledger=ledger, prices=prices)
        server._own_ledger = ledger
        server._tenants = tenants
        return server

    @property
    def port(self) -> int:
        """The port it listens on; the real one even where the settings say 0."""
        return self._port

    @property
    def address(self) -> str:
        """Base URL for clients on this machine or network."""
        scheme = "https" if self.settings.tls_certificate else "http"
        return f"{scheme}://{_reachable(self.settings.host)}:{self._port}"

    @property
    def admin_address(self) -> str | None:
        """Base URL of the admin API, if there is one."""
        return None if self._admin_port is None else f"http://{_reachable(self.settings.admin_host)}:{self._admin_port}"

    @property
    def metrics_address(self) -> str | None:
        """Base URL of the metrics port, if there is one."""
        return None if self._metrics_port is None else f"http://{_reachable(self.settings.host)}:{self._metrics_port}"

    async def start(self) -> None:
        """Listen. Raises `ConfigError` when an address cannot be bound."""
        settings = self.settings
        listeners = [_bind(settings.host, settings.port, "port")]
        self._port = listeners[0].getsockname()[1]
        configs = [self._uvicorn_config()]
        if settings.admin_port is not None and settings.admin_token is not None:
            listeners.append(_bind(settings.admin_host, settings.admin_port, "admin_port"))
            self._admin_port = listeners[-1].getsockname()[1]
            configs.append(_config(AdminApi(self.app, settings.admin_token), settings))
        if settings.metrics_port is not None:
            listeners.append(_bind(settings.host, settings.metrics_port, "metrics_port"))
            self._metrics_port = listeners[-1].getsockname()[1]
            configs.append(_config(AdminApi(self.app, None), settings))
        await self.app.start()
        if self._tenants is not None:
            self.following = asyncio.create_task(self._tenants.run(self.app.accounts.set_directory))
        for config, listener in zip(configs, listeners, strict=True):
            server = _Server(config)
            self._servers.append((server, asyncio.create_task(server.serve(sockets=[listener]))))
        async with asyncio.timeout(START_TIMEOUT_S):
            await asyncio.gather(*(server.listening.wait() for server, _ in self._servers))
        log.info("gateway listens at %s", self.address)

    async def stop(self, drain_timeout_s: float | None = None) -> None:
        """Drain: say not ready, serve on for the propagation time, refuse new requests, finish the running ones."""
        if not self._servers:
            return
        timeout_s = self.settings.drain_timeout if drain_timeout_s is None else drain_timeout_s
        clean = await self.app.drain(timeout_s, propagation_s=self.settings.drain_propagation)
        if not clean:
            log.warning("gateway: some requests did not finish within %g s and were ended", timeout_s)
        for server, _ in self._servers:
            server.should_exit = True
        await asyncio.gather(*(serving for _, serving in self._servers))
        self._servers.clear()
        if self.following is not None:
            self.following.cancel()
        await self.app.close()
        if self._own_ledger is not None:
            await asyncio.to_thread(self._own_ledger.close)

    def _uvicorn_config(self) -> uvicorn.Config:
        settings = self.settings
        config = _config(self.app, settings)
        config.ssl_certfile, config.ssl_keyfile = settings.tls_certificate, settings.tls_key
        return config


def _config(app: App, settings: GatewaySettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=bounded_protocol(settings.max_header_bytes, settings.header_timeout),
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
    )


def _bind(host: str, port: int, setting: str) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"{setting}: cannot listen on {host}:{port} ({error.strerror}); choose another port"
        ) from error
    listener.setblocking(False)
    return listener


def _reachable(host: str) -> str:
    """A host to put into a URL for an address that is listened on."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
