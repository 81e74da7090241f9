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
from octavo_gateway.http_protocol import bounded_protocol
from octavo_gateway.listeners import Listeners
from octavo_gateway.registry import Registry
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.tenancy import TenantDirectory
from octavo_gateway.tenancy.follow import TenantFollower, tenant_follower
from octavo_gateway.usage import Ledger, PriceTable
from octavo_gateway.usage.journal import JournalInUseError
from octavo_gateway.usage.ledger import DATABASE
from octavo_gateway.workers.seat import Seat

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
        seat: Seat | None = None,
    ) -> None:
        self.settings = settings
        self._seat = seat
        self.app: Gateway = create_app(settings, registry, directory=directory, ledger=ledger, prices=prices, seat=seat)
        self._servers: list[tuple[_Server, asyncio.Task[None]]] = []
        self._own_ledger: Ledger | None = None
        self._tenants: TenantFollower | None = None
        self.following: asyncio.Task[None] | None = None
        self.listeners: Listeners | None = None  # once it has started

    @classmethod
    def from_settings(
        cls,
        settings: GatewaySettings,
        registry: Registry,
        *,
        prices: PriceTable | None = None,
        api_server: ApiServer | None = None,
        seat: Seat | None = None,
    ) -> GatewayServer:
        """A gateway with the tenants and the ledger that its settings name; it closes the ledger when it stops.

        Tenants are followed while it runs; `following` is that task, which ends only by an error. Raises `ConfigError`
        or `LedgerError`.
        """
        tenants = tenant_follower(settings, api_server)
        directory = None if tenants is None else tenants.load()
        ledger = _open_ledger(settings, seat)
        server = cls(settings, registry, directory=directory, ledger=ledger, prices=prices, seat=seat)
        server._own_ledger = ledger
        server._tenants = tenants
        return server

    @property
    def address(self) -> str:
        """Base URL for clients on this machine or network."""
        return self._bound.address

    @property
    def port(self) -> int:
        """The port it listens on; the real one even where the settings say 0."""
        return self._bound.port

    @property
    def _bound(self) -> Listeners:
        if self.listeners is None:
            raise RuntimeError("the gateway has not started")
        return self.listeners

    async def start(self) -> None:
        """Listen. Raises `ConfigError` when an address cannot be bound."""
        await self.prepare()
        await self.accept()

    async def prepare(self) -> None:
        """Bind, and begin the work in the background; connections wait until `accept`."""
        self.listeners = self._seat.listeners if self._seat is not None else Listeners.bind(self.settings)
        await self.app.start()
        if self._tenants is not None:
            self.following = asyncio.create_task(self._tenants.run(self.app.accounts.set_directory))

    async def accept(self) -> None:
        """Serve."""
        settings, bound = self.settings, self._bound
        served = [(self._uvicorn_config(), bound.public)]
        if bound.admin is not None:
            served.append((_config(AdminApi(self.app, settings.admin_token), settings), bound.admin))
        if bound.metrics is not None:
            served.append((_config(AdminApi(self.app, None), settings), bound.metrics))
        for config, listener in served:
            server = _Server(config)
            self._servers.append((server, asyncio.create_task(server.serve(sockets=[listener]))))
        async with asyncio.timeout(START_TIMEOUT_S):
            await asyncio.gather(*(server.listening.wait() for server, _ in self._servers))
        log.info("gateway listens at %s", self.address)

    def make_room(self) -> None:
        """Listen no longer and let another gateway begin in the same place, while this one ends what it has begun."""
        for server, _ in self._servers:
            for listening in server.servers:
                listening.close()
        if self.listeners is not None:
            self.listeners.close()
        if self._own_ledger is not None:
            self._own_ledger.make_room()

    async def stop(self, drain_timeout_s: float | None = None) -> None:
        """Drain: say not ready, serve on for the propagation time, refuse new requests, finish the running ones."""
        if self.listeners is None:
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


def _open_ledger(settings: GatewaySettings, seat: Seat | None) -> Ledger | None:
    """Workers keep journals of their own and share the database.

    Where one of a killed gateway still ends its requests, its successor takes a folder beside it.
    """
    if settings.ledger is None:
        return None
    folder = Path(settings.ledger)
    index, count = (0, 1) if seat is None else (seat.index, seat.count)
    if index == 0:
        _deliver_left_behind(settings, folder, count)
    while True:
        try:
            return Ledger(
                folder / f"worker-{index}" if index else folder,
                settings.ledger_url,
                database=folder / DATABASE,
                spool_bytes=settings.ledger_spool_bytes,
            )
        except JournalInUseError as error:
            if not error.leaving:
                raise
            index += count


def _deliver_left_behind(settings: GatewaySettings, folder: Path, count: int) -> None:
    """Journals of workers that there were when there were more of them; what they left open is found as others' is."""
    for own in folder.glob("worker-*"):
        number = own.name.removeprefix("worker-")
        if own.is_dir() and number.isdigit() and int(number) >= count:
            with contextlib.suppress(JournalInUseError):  # whoever uses it delivers
                ledger = Ledger(own, settings.ledger_url, database=folder / DATABASE)
                ledger.take_unfinished()
                ledger.close()


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
