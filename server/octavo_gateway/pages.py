"""What the gateway answers by itself: probes, metrics, the model list, the web page and its state."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import lru_cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from octavo_gateway.asgi import HTML, TEXT
from octavo_gateway.errors import MethodNotAllowedError, RouteNotFoundError
from octavo_gateway.exchange import Exchange
from octavo_gateway.web import PAGE_HEADERS, page

if TYPE_CHECKING:
    from octavo_gateway.app import Gateway

Page = Callable[[Exchange], Awaitable[None]]

PUBLIC = frozenset({"/", "/health", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"})
"""What needs no key even where there are tenants: the page without any data, and the probes."""


@lru_cache(maxsize=1)
def octavo_version() -> str:
    """Version of this distribution."""
    return version("octavo")


class Pages:
    """The pages of one gateway, by path."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._pages: dict[str, Page] = {
            "/": self._web_page,
            "/api/state": self._state,
            "/api/usage": self._usage,
            "/health": self._ready,
            "/health/live": self._live,
            "/health/ready": self._ready,
            "/metrics": self._metrics,
            "/version": self._version,
            "/v1/models": self._list_models,
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
        }

    def find(self, path: str) -> Page | None:
        """The page at a path, if it is one."""
        if path.startswith("/v1/models/"):
            return self._one_model
        return self._pages.get(path)

    async def serve(self, exchange: Exchange, page: Page) -> None:
        """Answer; raises `GatewayError` for what the client is to be told."""
        if exchange.method not in ("GET", "HEAD"):
            raise MethodNotAllowedError(f"{exchange.method} is not allowed on {exchange.path[:200]}; use GET.")
        if exchange.path not in PUBLIC:
            exchange.identity = self._gateway.accounts.authenticate(exchange)
            if exchange.identity is not None and exchange.path == "/metrics":
                raise RouteNotFoundError("Metrics are served on the metrics port.")
        await page(exchange)

    async def _live(self, exchange: Exchange) -> None:
        await exchange.respond(200, b'{"status":"live"}')

    async def _ready(self, exchange: Exchange) -> None:
        """Ready once discovery has told what there is, until the drain begins."""
        synced, leaving = self._gateway.synced, self._gateway.leaving
        ready = synced and not leaving
        status = "ready" if ready else "draining" if leaving else "waiting for discovery"
        await exchange.respond(200 if ready else 503, json.dumps({"status": status}).encode())

    async def _version(self, exchange: Exchange) -> None:
        await exchange.respond(200, json.dumps({"version": octavo_version()}).encode())

    async def _metrics(self, exchange: Exchange) -> None:
        await exchange.respond(200, await self._gateway.whole.metrics_page(), TEXT)

    async def _web_page(self, exchange: Exchange) -> None:
        await exchange.respond(200, page(), HTML, PAGE_HEADERS)

    async def _state(self, exchange: Exchange) -> None:
        document = await self._gateway.state(exchange.identity)
        await exchange.respond(200, document, extra=[(b"cache-control", b"no-store")])

    async def _usage(self, exchange: Exchange) -> None:
        """This month's sums of the caller's tenant; where there are no tenants, of everything."""
        tenant = exchange.identity.tenant.name if exchange.identity is not None else None
        document = await self._gateway.usage_this_month.document(tenant)
        await exchange.respond(200, document, extra=[(b"cache-control", b"no-store")])

    async def _list_models(self, exchange: Exchange) -> None:
        data = [self._card(name) for name, _ in self._gateway.proxy.listing(exchange.identity)]
        await exchange.respond(200, json.dumps({"object": "list", "data": data}).encode())

    async def _one_model(self, exchange: Exchange) -> None:
        name = exchange.path.removeprefix("/v1/models/")
        self._gateway.proxy.resolve(name, exchange.identity)
        await exchange.respond(200, json.dumps(self._card(name)).encode())

    def _card(self, name: str) -> dict[str, object]:
        resolved = self._gateway.registry.snapshot.names[name]
        entry = resolved.entry
        return {
            "id": name,
            "object": "model",
            "created": entry.created,
            "owned_by": entry.namespace or "octavo",
            "root": resolved.adapter or entry.name,
            "parent": entry.name if resolved.adapter else None,
        }
