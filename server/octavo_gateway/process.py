"""A gateway as a process of its own: joins discovery and server, and ends on signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from octavo_gateway.discovery import ApiServer, KubernetesDiscovery, StaticDiscovery
from octavo_gateway.registry import Registry
from octavo_gateway.server import GatewayServer
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.upstream import UpstreamPool
from octavo_gateway.usage import PriceTable
from octavo_gateway.workers.seat import Seat

log = logging.getLogger("octavo.gateway")

SYNC_POLL_S = 0.02
WORKER_SYNC_S = 30.0
"""A worker serves after this long even if discovery has told nothing yet."""


class Follower(Protocol):
    """Something that runs as long as the gateway and keeps a part of it current."""

    async def run(self) -> None: ...


@dataclass(frozen=True)
class Sources:
    """Where models come from: a file, or a cluster (all of it, or one namespace)."""

    models_file: Path | None = None
    api_server: ApiServer | None = None
    namespace: str | None = None
    prices: PriceTable = field(default_factory=PriceTable)

    def discovery(self, registry: Registry, pool: UpstreamPool) -> Follower:
        """The follower that fills the registry."""
        if self.api_server is not None:
            return KubernetesDiscovery(self.api_server, registry, namespace=self.namespace)
        if self.models_file is not None:
            return StaticDiscovery(self.models_file, registry, pool)
        raise ValueError("neither a models file nor a cluster")


async def run_gateway(
    settings: GatewaySettings, sources: Sources, say: Callable[[str], None], seat: Seat | None = None
) -> None:
    """Serve until a signal: the first drains, a second one ends at once. A worker takes its `seat`.

    Raises `ConfigError` or `LedgerError` for what is wrong at the start, and whatever ends a follower later.
    """
    registry = Registry()
    server = GatewayServer.from_settings(
        settings, registry, prices=sources.prices, api_server=sources.api_server, seat=seat
    )
    await server.prepare()
    followers = [asyncio.create_task(sources.discovery(registry, server.app.pool).run())]
    if server.following is not None:
        followers.append(server.following)
    await _serve(server, followers, say, seat)


async def _serve(
    server: GatewayServer, followers: list[asyncio.Task[None]], say: Callable[[str], None], seat: Seat | None
) -> None:
    stop = _stop_on_signals() if seat is None else _stop_with_parent(seat, server)
    ends: list[asyncio.Task[object]] = [asyncio.create_task(stop.wait()), *followers]
    if seat is None:
        await server.accept()  # its probes say how far it is
        await _synced(server, ends, None)
        if server.listeners is not None:
            say(f"octavo gateway listens at {server.address}")
            if server.listeners.admin_address:
                say(f"admin API at {server.listeners.admin_address}")
    else:
        await _synced(server, ends, WORKER_SYNC_S)  # its peers, or its connections, can wait for it
        await server.accept()
        seat.tell_ready()
    _calm_the_collector()
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set() and server.app.in_flight:
            say(f"octavo gateway: finishing {server.app.in_flight} requests; Ctrl-C again ends at once")
        await server.stop(None if stop.is_set() else 0.0)
        for follower in followers:
            if follower.done() and not follower.cancelled():
                follower.result()
    finally:
        for task in ends:
            task.cancel()
        await asyncio.gather(*ends, return_exceptions=True)


def _calm_the_collector() -> None:
    """What exists now lives as long as the process, so no collection need look at it again; and as requests leave next
    to no cycles behind, collections may be rare. Both shorten the pauses that streams would feel."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 20)


async def _synced(server: GatewayServer, ends: list[asyncio.Task[object]], timeout_s: float | None) -> None:
    """Wait for a first view of models and tenants, or for an end."""

    async def wait() -> None:
        while not server.app.synced:  # noqa: ASYNC110 - once, of two sources
            await asyncio.sleep(SYNC_POLL_S)

    waiting = asyncio.create_task(wait())
    await asyncio.wait({waiting, *ends}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            sys.exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


def _stop_with_parent(seat: Seat, server: GatewayServer) -> asyncio.Event:
    """A worker drains when it is told to, and when its parent is gone: then it leaves its place to another gateway."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_end_of_parent() -> None:
        loop.remove_reader(seat.life)
        server.make_room()
        seat.clear()
        stop.set()

    loop.add_reader(seat.life, on_end_of_parent)
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    return stop
