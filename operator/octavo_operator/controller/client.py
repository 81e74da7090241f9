"""A small Kubernetes client: every call has a deadline, throttling is obeyed, errors say which call failed and why."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp

from octavo_operator.api.errors import OctavoOperatorError
from octavo_operator.controller.tracing import NO_TRACER, api_call

log = logging.getLogger("octavo.operator.client")

FIELD_MANAGER = "octavo"
REQUEST_TIMEOUT_S = 30.0
WATCH_SILENCE_S = 90.0  # bookmarks come every minute; a longer silence is a dead connection
ATTEMPTS = 5
RETRIED = frozenset({429, 500, 502, 503, 504})
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"
_JSON = "application/json-patch+json"

Object = dict[str, Any]


class ApiError(OctavoOperatorError):
    """The API server refused a call, or could not be reached (`status` 0)."""

    def __init__(self, call: str, status: int, message: str, reason: str = "") -> None:
        self.call, self.status, self.message, self.reason = call, status, message, reason
        super().__init__(f"{call}: {status or 'unreachable'}: {message}")

    @property
    def is_conflict(self) -> bool:
        return self.status == 409

    @property
    def is_missing(self) -> bool:
        return self.status == 404

    @property
    def is_refusal(self) -> bool:
        """Whether repeating the same call is pointless: the object itself is refused."""
        return self.status in (400, 403, 422)


@dataclass(frozen=True)
class Kind:
    """Where the objects of a kind live in the API."""

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        prefix = f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"
        parts = [prefix]
        if self.namespaced and namespace:
            parts.append(f"namespaces/{namespace}")
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


class KubeClient:
    """Calls of one operator. `session` carries credentials; close it with `close`."""

    def __init__(
        self,
        server: str,
        session: aiohttp.ClientSession,
        authorize: Callable[[], Mapping[str, str]] = dict,
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self._server = server.rstrip("/")
        self._session = session
        self._authorize = authorize  # headers of the moment: tokens of service accounts rotate
        self._may_write = may_write  # the fence: who lost the lease in its sleep must not write when it wakes
        self.tracer = NO_TRACER
        self.calls = 0  # for tests and metrics; watches are not counted
        self.writes = 0

    async def close(self) -> None:
        await self._session.close()

    async def get(self, kind: Kind, namespace: str | None, name: str) -> Object:
        return await self._call("GET", kind.path(namespace, name))

    async def list_objects(self, kind: Kind, namespace: str | None = None, selector: str = "") -> Object:
        """A list as the API server's cache holds it: cheap, and never older than what a watch then continues from."""
        return await self._call("GET", kind.path(namespace), params={"labelSelector": selector, "resourceVersion": "0"})

    async def apply(self, kind: Kind, obj: Object) -> Object:
        """Server-side apply: creates the object or makes exactly our fields so, taking them over from others."""
        metadata = obj["metadata"]
        params = {"fieldManager": FIELD_MANAGER, "force": "true"}
        path = kind.path(metadata.get("namespace"), metadata["name"])
        return await self._call("PATCH", path, params=params, body=obj, content_type=_APPLY)

    async def serves(self, kind: Kind) -> bool:
        """Whether the cluster has this kind."""
        try:
            found = await self._call("GET", f"/apis/{kind.api_version}")
        except ApiError as error:
            if error.is_missing:
                return False
            raise
        return any(resource["name"] == kind.plural for resource in found.get("resources") or [])

    async def create(self, kind: Kind, obj: Object) -> Object:
        return await self._call("POST", kind.path(obj["metadata"].get("namespace")), body=obj)

    async def update(self, kind: Kind, obj: Object) -> Object:
        """Replace an object; a conflict is raised when it changed meanwhile."""
        metadata = obj["metadata"]
        return await self._call("PUT", kind.path(metadata.get("namespace"), metadata["name"]), body=obj)

    async def patch_status(self, kind: Kind, namespace: str | None, name: str, status: Object) -> Object:
        """Replace the status as a whole; its only writer is the operator."""
        path = kind.path(namespace, name, "status")
        body = [{"op": "add", "path": "/status", "value": status}]
        return await self._call("PATCH", path, params={"fieldManager": FIELD_MANAGER}, body=body, content_type=_JSON)

    async def patch(self, kind: Kind, namespace: str | None, name: str, patch: Object) -> Object:
        params = {"fieldManager": FIELD_MANAGER}
        return await self._call("PATCH", kind.path(namespace, name), params=params, body=patch, content_type=_MERGE)

    async def delete(self, kind: Kind, namespace: str | None, name: str, uid: str | None = None) -> None:
        """Delete; with `uid` only that very object, not one made anew under its name. Absence is success."""
        body: Object = {"propagationPolicy": "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            await self._call("DELETE", kind.path(namespace, name), body=body)
        except ApiError as error:
            if not error.is_missing:
                raise

    async def watch(
        self, kind: Kind, namespace: str | None, selector: str, resource_version: str
    ) -> AsyncIterator[tuple[str, Object]]:
        """(event type, object) after a version, until the server ends the stream. `ApiError` 410: list anew."""
        params = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "labelSelector": selector,
            "resourceVersion": resource_version,
            "timeoutSeconds": str(random.randint(240, 360)),  # noqa: S311 - spreads reconnects
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=WATCH_SILENCE_S)
        call = f"WATCH {kind.plural}"
        try:
            async with self._session.get(
                self._server + kind.path(namespace), params=params, timeout=timeout, headers=self._authorize()
            ) as answer:
                if answer.status != 200:
                    raise await _error(call, answer)
                async for line in _lines(answer):
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        status = event["object"]
                        raise ApiError(call, int(status.get("code", 500)), status.get("message", ""))
                    yield event["type"], event["object"]
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise ApiError(call, 0, str(error) or type(error).__name__) from error

    async def _call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Object | list[Object] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        call = f"{method} {path}"
        self.calls += 1
        if method != "GET":
            self.writes += 1
        with api_call(self.tracer, method, path):
            once = partial(self._once, call, method, path, params, body, content_type)
            return await self._persistently(call, method, once)

    async def _persistently(self, call: str, method: str, once: Callable[[], Awaitable[Object]]) -> Object:
        error = ApiError(call, 0, "not tried")
        for attempt in range(ATTEMPTS):
            if method != "GET" and not self._may_write():
                raise ApiError(call, 0, "not written: this operator does not hold the lease any more")
            try:
                return await once()
            except _Throttled as throttled:
                error, delay = throttled.error, throttled.delay_s
            except (aiohttp.ClientError, TimeoutError, OSError) as cause:
                error, delay = ApiError(call, 0, str(cause) or type(cause).__name__), None
            if attempt + 1 < ATTEMPTS:
                pause = delay if delay is not None else 0.2 * 2**attempt
                log.debug("%s; trying again in %.1f s", error, pause)
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311
        raise error

    async def _once(
        self,
        call: str,
        method: str,
        path: str,
        params: Mapping[str, str] | None,
        body: Object | list[Object] | None,
        content_type: str,
    ) -> Object:
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": content_type, "Accept": "application/json", **self._authorize()}
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=10)
        async with self._session.request(
            method, self._server + path, params=params, data=data, headers=headers, timeout=timeout
        ) as answer:
            if answer.status < 300:
                found: Object = await answer.json()
                return found
            error = await _error(call, answer)
            if answer.status in RETRIED:
                raise _Throttled(error, _retry_after_s(answer))
            raise error


class _Throttled(Exception):  # noqa: N818 - never leaves this file
    """An answer that may be better next time."""

    def __init__(self, error: ApiError, delay_s: float | None) -> None:
        self.error, self.delay_s = error, delay_s
        super().__init__(str(error))


def _retry_after_s(answer: aiohttp.ClientResponse) -> float | None:
    try:
        return min(float(answer.headers["Retry-After"]), 30.0)
    except (KeyError, ValueError):
        return None


async def _error(call: str, answer: aiohttp.ClientResponse) -> ApiError:
    text = await answer.text()
    try:
        status = json.loads(text)
        return ApiError(call, answer.status, str(status.get("message", text)), str(status.get("reason", "")))
    except (ValueError, AttributeError):
        return ApiError(call, answer.status, text[:500])


async def _lines(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Lines of any length; aiohttp's own reader refuses long ones."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line:
                yield line
