"""A running gateway over replicas of a test's making, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

from fakes.openai_replica import OpenAIReplica
from octavo_gateway.discovery import LocalDiscovery
from octavo_gateway.registry import Endpoint, ModelEntry, Registry, Strategy
from octavo_gateway.server import GatewayServer
from octavo_gateway.settings import GatewaySettings

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
FAST: dict[str, Any] = {"report_interval": 0.05, "heartbeat_interval": 0.1, "connect_timeout": 0.5}


def entry(*replicas: OpenAIReplica, name: str = "m", **fields: Any) -> ModelEntry:
    """A model served by these replicas, least-loaded unless told otherwise."""
    assert all(r.port for r in replicas), "serve the replicas first"
    endpoints = tuple(Endpoint(r.name, r.url) for r in replicas)
    return ModelEntry(**({"name": name, "endpoints": endpoints, "strategy": Strategy.LEAST_LOADED} | fields))


@dataclass
class Door:
    """A gateway under test and a client of it."""

    server: GatewayServer
    discovery: LocalDiscovery
    http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return self.server.address

    def serve(self, *entries: ModelEntry) -> None:
        self.discovery.set_models(entries)

    def post(self, body: Any, path: str = "/v1/chat/completions", **kwargs: Any) -> Any:
        return self.http.post(self.url + path, json=body, **kwargs)

    async def read(self, body: Any, **kwargs: Any) -> tuple[int, str, dict[str, str]]:
        """Status, text and headers of a whole answer."""
        async with self.post(body, **kwargs) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return response.status, await response.text(), headers

    async def events(self, body: dict[str, Any], **kwargs: Any) -> str:
        """The whole text of a streamed answer."""
        status, text, _ = await self.read(body | {"stream": True}, **kwargs)
        assert status == 200, text
        return text


@contextlib.asynccontextmanager
async def open_door(*entries: ModelEntry, **settings: Any) -> AsyncIterator[Door]:
    """Start a gateway with these settings (and directory, ledger, prices); it is drained at the end."""
    registry = Registry()
    parts = {name: settings.pop(name) for name in ("directory", "ledger", "prices") if name in settings}
    server = GatewayServer(GatewaySettings(port=0, **(FAST | settings)), registry, **parts)
    discovery = LocalDiscovery(registry)
    discovery.set_models(entries)
    await server.start()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        try:
            yield Door(server, discovery, http)
        finally:
            await server.stop(0.5)


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until the condition holds; the timeout only bounds a failing test."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
