"""List and watch of a Kubernetes API over a real socket, with the faults that a real one shows: 410, silence, errors.

Only what a gateway reads: no writes through HTTP, no validation. Tests put objects in directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Object = dict[str, Any]


@dataclass
class KubeApi:
    """Objects by collection path (without namespace) and `namespace/name`."""

    objects: dict[str, dict[str, Object]] = field(default_factory=dict)
    version: int = 100
    lists: list[str] = field(default_factory=list)
    watches: list[str] = field(default_factory=list)
    fail_with: int | None = None
    silent: bool = False  # watches stay open and tell nothing any more
    url: str = ""
    _log: list[tuple[str, str, Object]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _open: set[web.StreamResponse] = field(default_factory=set)
    _expired_below: int = 0

    def put(self, collection: str, item: Object) -> None:
        """Create or replace an object."""
        known = self.objects.setdefault(collection, {})
        self._write("MODIFIED" if self._key(item) in known else "ADDED", collection, item)

    def delete(self, collection: str, name: str, namespace: str = "default") -> None:
        item = self.objects[collection][f"{namespace}/{name}"]
        self._write("DELETED", collection, item)

    def expire_history(self) -> None:
        """Forget old versions: watches from before get 410, as after etcd's compaction."""
        self._expired_below = self.version + 1
        self.version += 1

    def cut_watches(self) -> None:
        """Break every open watch."""
        for response in list(self._open):
            if response._req is not None and response._req.transport is not None:
                response._req.transport.abort()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[KubeApi]:
        app = web.Application()
        app.router.add_get("/{tail:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            self.cut_watches()
            await runner.cleanup()

    def _write(self, kind: str, collection: str, item: Object) -> None:
        self.version += 1
        item = json.loads(json.dumps(item))
        item["metadata"].setdefault("namespace", "default")
        item["metadata"]["resourceVersion"] = str(self.version)
        known = self.objects.setdefault(collection, {})
        if kind == "DELETED":
            known.pop(self._key(item), None)
        else:
            known[self._key(item)] = item
        self._log.append((kind, collection, item))
        self._news.set()
        self._news = asyncio.Event()

    @staticmethod
    def _key(item: Object) -> str:
        return f"{item['metadata'].get('namespace', 'default')}/{item['metadata']['name']}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.fail_with is not None:
            return web.json_response({"code": self.fail_with}, status=self.fail_with)
        parts = request.path.split("/")
        namespace = None
        if "namespaces" in parts:
            at = parts.index("namespaces")
            namespace = parts[at + 1]
            parts = parts[:at] + parts[at + 2 :]
        collection = "/".join(parts)
        selector = request.query.get("labelSelector", "")
        if request.query.get("watch"):
            return await self._watch(request, collection, selector, namespace)
        self.lists.append(collection)
        items = [i for i in self.objects.get(collection, {}).values() if self._fits(i, selector, namespace)]
        start = int(request.query.get("continue") or 0)
        limit = int(request.query.get("limit") or len(items) or 1)
        meta = {"resourceVersion": str(self.version)}
        if start + limit < len(items):
            meta["continue"] = str(start + limit)
        return web.json_response({"metadata": meta, "items": items[start : start + limit]})

    async def _watch(
        self, request: web.Request, collection: str, selector: str, namespace: str | None
    ) -> web.StreamResponse:
        self.watches.append(collection)
        since = int(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        self._open.add(response)
        try:
            if since < self._expired_below:
                await self._send(response, "ERROR", {"kind": "Status", "code": 410})
                return response
            while True:
                news = self._news
                for kind, where, item in list(self._log):
                    version = int(item["metadata"]["resourceVersion"])
                    if where == collection and version > since and self._fits(item, selector, namespace):
                        since = version
                        if not self.silent:
                            await self._send(response, kind, item)
                await news.wait()
        finally:
            self._open.discard(response)

    @staticmethod
    async def _send(response: web.StreamResponse, kind: str, item: Object) -> None:
        await response.write(json.dumps({"type": kind, "object": item}).encode() + b"\n")

    @staticmethod
    def _fits(item: Object, selector: str, namespace: str | None) -> bool:
        labels = item["metadata"].get("labels", {})
        if namespace is not None and item["metadata"].get("namespace") != namespace:
            return False
        for term in filter(None, selector.split(",")):
            name, _, value = term.partition("=")
            if name not in labels or (value and labels[name] != value):
                return False
        return True
