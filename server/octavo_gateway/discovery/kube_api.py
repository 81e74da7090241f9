"""The little of the Kubernetes API that a gateway needs: list and watch, over plain HTTP, never silently stale."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import ssl
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from octavo_gateway.errors import ConfigError

log = logging.getLogger("octavo.gateway.discovery")

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_S = 290
SILENCE_S = 90.0  # bookmarks come about every minute; longer silence means a dead connection
BACKOFF_S = (0.5, 30.0)
PAGE_SIZE = 500
RELIST_AFTER_FAILURES = 2

Item = Mapping[str, Any]


@dataclass(frozen=True)
class ApiServer:
    """Where the API is and how to prove who we are. The token file is reread, because tokens are rotated."""

    url: str
    token_file: Path | None = None
    ca_file: Path | None = None

    @classmethod
    def in_cluster(cls, environment: Mapping[str, str] | None = None) -> ApiServer:
        """From what Kubernetes puts into a pod; raises `ConfigError` outside of one."""
        environment = os.environ if environment is None else environment
        host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT")
        if not host or not port:
            raise ConfigError(
                "kubernetes: this is no pod (KUBERNETES_SERVICE_HOST is not set); outside of a cluster run "
                "`kubectl proxy` and give its address with --kubernetes-api"
            )
        shown = f"[{host}]" if ":" in host else host
        return cls(f"https://{shown}:{port}", SERVICE_ACCOUNT / "token", SERVICE_ACCOUNT / "ca.crt")

    def headers(self) -> dict[str, str]:
        """Authorization of the next request."""
        if self.token_file is None:
            return {}
        return {"authorization": f"Bearer {self.token_file.read_text(encoding='ascii').strip()}"}

    def tls(self) -> ssl.SSLContext | bool:
        """The trust towards the API server."""
        return True if self.ca_file is None else ssl.create_default_context(cafile=str(self.ca_file))


@dataclass
class Watched:
    """All objects of one kind, kept current. `synced` once the first list is complete."""

    path: str
    label_selector: str = ""
    items: dict[str, Item] = field(default_factory=dict)
    synced: bool = False
    relists: int = 0


class Watcher:
    """Keeps one `Watched` current: list, then watch from there, and list again whenever the watch cannot go on."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        server: ApiServer,
        watched: Watched,
        on_change: Callable[[], None],
        *,
        silence_s: float = SILENCE_S,
        backoff_s: tuple[float, float] = BACKOFF_S,
    ) -> None:
        self._http = http
        self._server = server
        self._watched = watched
        self._on_change = on_change
        self._version = ""  # of what was seen last; empty: list anew
        self._silence_s = silence_s
        self._backoff_s = backoff_s

    async def run(self) -> None:
        """Follow until cancelled. While the API server is away the last view stays."""
        failures = 0
        while True:
            begun_at = self._version
            try:
                if not self._version:
                    self._version = await self._list()
                await self._watch()
                failures = 0
            except (aiohttp.ClientError, TimeoutError, OSError, json.JSONDecodeError, KeyError) as error:
                failures = 1 if self._version != begun_at else failures + 1
                if failures >= RELIST_AFTER_FAILURES:
                    self._version = ""  # going on from where the watch was has not helped
                low, high = self._backoff_s
                pause = min(low * 2 ** (failures - 1), high) * (0.5 + random.random() / 2)  # noqa: S311 - jitter
                log.warning("kubernetes: %s: %s; again in %.1f s", self._watched.path, error or "silent", pause)
                await asyncio.sleep(pause)

    async def _list(self) -> str:
        items: dict[str, Item] = {}
        token = ""
        while True:
            parameters = {"limit": str(PAGE_SIZE), "labelSelector": self._watched.label_selector, "continue": token}
            page = await self._get(parameters)
            items.update({_key(item): item for item in page["items"]})
            token = page["metadata"].get("continue") or ""
            if not token:
                break
        self._watched.items = items
        self._watched.synced = True
        self._watched.relists += 1
        self._on_change()
        return str(page["metadata"]["resourceVersion"])

    async def _get(self, parameters: dict[str, str]) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=30)
        wanted = {name: value for name, value in parameters.items() if value}
        url = self._server.url + self._watched.path
        async with self._http.get(url, params=wanted, headers=self._server.headers(), timeout=timeout) as response:
            if response.status != 200:
                raise aiohttp.ClientError(f"list answered {response.status}")
            page: dict[str, Any] = await response.json(content_type=None)
            return page

    async def _watch(self) -> None:
        """Follow events until the server ends the watch; no version is left when the next step is to list anew."""
        async for event in self._events(self._version):
            kind, item = event["type"], event["object"]
            if kind == "ERROR":
                log.info("kubernetes: %s: watch ended (%s); listing anew", self._watched.path, item.get("code"))
                self._version = ""
                return
            self._version = item["metadata"]["resourceVersion"]
            if kind == "BOOKMARK":
                continue
            if kind == "DELETED":
                self._watched.items.pop(_key(item), None)
            else:
                self._watched.items[_key(item)] = item
            self._on_change()

    async def _events(self, version: str) -> AsyncIterator[dict[str, Any]]:
        parameters = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_S),
        }
        if self._watched.label_selector:
            parameters["labelSelector"] = self._watched.label_selector
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=self._silence_s)
        url = self._server.url + self._watched.path
        async with self._http.get(url, params=parameters, headers=self._server.headers(), timeout=timeout) as response:
            if response.status == 410:
                yield {"type": "ERROR", "object": {"code": 410}}
                return
            if response.status != 200:
                raise aiohttp.ClientError(f"watch answered {response.status}")
            rest = b""
            async for data in response.content.iter_any():
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield json.loads(line)


async def follow(
    server: ApiServer, kinds: Sequence[Watched], on_change: Callable[[], None], settle_s: float, **options: Any
) -> None:
    """Keep kinds current until cancelled; `on_change` is called once all are listed and whenever changes settle."""
    changed = asyncio.Event()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=server.tls())) as http:
        watchers = [asyncio.create_task(Watcher(http, server, kind, changed.set, **options).run()) for kind in kinds]
        try:
            while True:
                await changed.wait()
                await asyncio.sleep(settle_s)
                changed.clear()
                if all(kind.synced for kind in kinds):
                    on_change()
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)


def _key(item: Item) -> str:
    meta = item["metadata"]
    return f"{meta.get('namespace', '')}/{meta['name']}"
