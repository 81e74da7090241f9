"""Keeps idle connections per replica address, newest first, and opens new ones under a deadline."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque

from octavo_gateway.registry import Endpoint
from octavo_gateway.upstream.connection import ConnectError, ConnectionLostError, UpstreamConnection
from octavo_gateway.upstream.tls import replica_context

Address = tuple[str, int, bool]


class UpstreamPool:
    """Connections to all replicas. `keep_alive_s` stays below the replicas' own keep-alive time (uvicorn: 5 s), so
    that a reused connection is rarely one the replica is just closing."""

    def __init__(
        self,
        *,
        connect_timeout_s: float = 2.0,
        keep_alive_s: float = 4.0,
        max_idle_per_endpoint: int = 512,
        tls: ssl.SSLContext | None = None,
        server_name: str | None = None,
    ) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._keep_alive_s = keep_alive_s
        self._max_idle = max_idle_per_endpoint
        self._tls = tls
        self._server_name = server_name
        self._idle: dict[Address, deque[UpstreamConnection]] = {}
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> int:
        """Connections kept for reuse."""
        return sum(len(connections) for connections in self._idle.values())

    async def connect(self, endpoint: Endpoint) -> UpstreamConnection:
        """An idle connection, or a new one. Raises `ConnectError`."""
        address = endpoint.address
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()
            if connection.reusable and connection.idle_s < self._keep_alive_s:
                return connection
            connection.abort()
        return await self._open(endpoint.id, address)

    def give_back(self, endpoint: Endpoint, connection: UpstreamConnection) -> None:
        """Keep a connection whose answer was read to its end; close any other."""
        if not connection.reusable:
            connection.abort()
            return
        idle = self._idle.setdefault(endpoint.address, deque())
        connection.rest()
        idle.append(connection)
        if len(idle) > self._max_idle:
            idle.popleft().abort()
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(self._keep_alive_s, self._drop_stale)

    async def get(self, endpoint: Endpoint, target: str, max_bytes: int) -> tuple[int, bytes]:
        """A small document of a replica: status and body; (0, b"") when it is larger. Raises `UpstreamError`.

        A connection that was closed for idleness just before is replaced by a fresh one.
        """
        try:
            return await self._get(endpoint, target, max_bytes)
        except ConnectionLostError as error:
            if not error.reused:
                raise
            self.forget(endpoint)
            return await self._get(endpoint, target, max_bytes)

    async def _get(self, endpoint: Endpoint, target: str, max_bytes: int) -> tuple[int, bytes]:
        host, port, _ = endpoint.address
        connection = await self.connect(endpoint)
        try:
            head = await connection.send(f"GET {target} HTTP/1.1\r\nhost: {host}:{port}\r\n\r\n".encode(), b"")
            body = bytearray()
            while chunk := await connection.read():
                body += chunk
                if len(body) > max_bytes:
                    return 0, b""
            return head.status, bytes(body)
        finally:
            self.give_back(endpoint, connection)

    def forget(self, endpoint: Endpoint) -> None:
        """Close the idle connections to a replica, because one of them has proved dead."""
        for connection in self._idle.pop(endpoint.address, ()):
            connection.abort()

    def close(self) -> None:
        """Close every idle connection; those in use are their users' to end."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for idle in self._idle.values():
            while idle:
                idle.pop().abort()
        self._idle.clear()

    async def _open(self, endpoint_id: str, address: Address) -> UpstreamConnection:
        host, port, uses_tls = address
        if uses_tls and self._tls is None:
            self._tls = replica_context(None, None, None)
        name = (self._server_name or host) if uses_tls else None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    UpstreamConnection, host, port, ssl=self._tls if uses_tls else None, server_hostname=name
                )
        except TimeoutError as error:
            raise ConnectError(f"replica {endpoint_id}: no connection within {self._connect_timeout_s:g} s") from error
        except (OSError, ssl.SSLError) as error:
            raise ConnectError(f"replica {endpoint_id}: {error}") from error
        return connection

    def _drop_stale(self) -> None:
        for address in list(self._idle):
            idle = self._idle[address]
            while idle and (idle[0].idle_s >= self._keep_alive_s or not idle[0].reusable):
                idle.popleft().abort()
            if not idle:
                del self._idle[address]
        self._sweep = None
        if self._idle:
            self._sweep = asyncio.get_running_loop().call_later(self._keep_alive_s, self._drop_stale)
