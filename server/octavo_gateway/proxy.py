"""The data path: find the model, get a lease on a replica, send the request, stream the answer back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from octavo_gateway import headers
from octavo_gateway.asgi import EVENT_STREAM, Headers, header
from octavo_gateway.dispatcher import Dispatcher, Lease, Turn
from octavo_gateway.errors import (
    GatewayError,
    ModelNotFoundError,
    NoReplicaInTimeError,
    NotSyncedError,
    UpstreamDeadlineError,
    UpstreamFailedError,
)
from octavo_gateway.exchange import Exchange
from octavo_gateway.metrics import Metrics
from octavo_gateway.progress import RESUMABLE, RESUMED, Progress
from octavo_gateway.registry import ModelEntry, Registry, Resolved, Snapshot
from octavo_gateway.relay import ENDS_WITH_DONE, refusal_in_stream, relay_answer
from octavo_gateway.routing import PREFIX, PrefixIndex, RouteRequest, prefix_value
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.tenancy import Identity
from octavo_gateway.upstream import (
    ConnectError,
    ConnectionLostError,
    ResponseHead,
    UpstreamConnection,
    UpstreamError,
    UpstreamPool,
)
from octavo_gateway.usage import UsageMeter

log = logging.getLogger("octavo.gateway")

REFUSED = frozenset({429, 503})
"""Answers by which a replica says that it has not begun: full, or draining."""


@dataclass(frozen=True, slots=True)
class Forward:
    """What is sent to a replica, for whom, and what counts its tokens."""

    resolved: Resolved
    body: bytes
    route: RouteRequest
    turn: Turn
    stream: bool
    identity: Identity | None = None
    meter: UsageMeter = field(default_factory=UsageMeter)
    progress: Progress = field(default_factory=Progress)
    prompt_bytes: int = 0
    usage_id: str = ""  # under which the replica remembers what it consumed

    @property
    def entry(self) -> ModelEntry:
        return self.resolved.entry


class _RetryError(Exception):
    """This attempt failed before the first byte in a way that makes another one safe."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _ResumeError(Exception):
    """The replica died in the middle of an answer with which another one can go on."""


class Proxy:
    """Forwards requests to replicas. One per gateway."""

    def __init__(
        self,
        settings: GatewaySettings,
        registry: Registry,
        dispatcher: Dispatcher,
        pool: UpstreamPool,
        index: PrefixIndex,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._dispatcher = dispatcher
        self._pool = pool
        self._index = index
        self._metrics = metrics
        self._clock = clock
        self._unanswered: dict[str, set[UpstreamConnection]] = {}  # by endpoint: no byte of an answer has come yet
        registry.subscribe(self._on_change)

    def resolve(self, name: str, identity: Identity | None = None) -> Resolved:
        """The model behind a name; raises `ModelNotFoundError` with the names the caller may use.

        A model that is not allowed looks exactly like one that does not exist.
        """
        resolved = self._registry.snapshot.resolve(name)
        if resolved is None and not self._registry.synced:
            raise NotSyncedError("This gateway is starting; send the request again.", retry_after_s=1.0)
        if resolved is None or (identity is not None and not identity.tenant.may_use(name)):
            raise ModelNotFoundError(name, [known for known, _ in self.listing(identity)])
        return resolved

    def listing(self, identity: Identity | None) -> list[tuple[str, Resolved]]:
        """Every name the caller may use, sorted."""
        names = self._registry.snapshot.listing()
        return [pair for pair in names if identity is None or identity.tenant.may_use(pair[0])]

    async def forward(self, exchange: Exchange, request: Forward) -> None:
        """Serve one request to its end. Raises `GatewayError` for what the client is to be told."""
        entry = request.entry
        original = request
        exchange.model = entry.name
        exchange.admitted_s = self._clock() - exchange.started_at
        exchange.progress = request.progress
        self._dispatcher.arrived(entry)
        excluded: frozenset[str] = frozenset()
        last_attempt = entry.retry.attempts
        while True:
            exchange.attempts += 1
            lease = await self._lease(exchange, request, excluded)
            exchange.replica, exchange.route_reason = lease.endpoint, lease.choice.reason
            self._index.record(lease.endpoint.id, request.route.prefix)
            may_retry = exchange.attempts < last_attempt
            try:
                await self._attempt(exchange, request, lease, may_retry)
                return
            except _RetryError as error:
                log.warning("request %s: replica %s: %s; retrying", exchange.request_id, lease.endpoint.id, error)
                self._metrics.retries.labels(entry.name, error.reason).inc()
                excluded |= {lease.endpoint.id}
            except _ResumeError as error:
                log.warning("request %s: replica %s: %s; resuming", exchange.request_id, lease.endpoint.id, error)
                self._metrics.retries.labels(entry.name, "resume").inc()
                excluded |= {lease.endpoint.id}
                request.progress.resumes += 1
                request = replace(original, body=request.progress.resumed_body(original.body))
                last_attempt = exchange.attempts + entry.retry.attempts
            finally:
                self._index.ended(lease.endpoint.id, request.route.prefix)
                self._dispatcher.release(lease)

    # ---- getting a replica

    async def _lease(self, exchange: Exchange, request: Forward, excluded: frozenset[str]) -> Lease:
        entry = self._registry.snapshot.models.get(request.entry.name, request.entry)
        if entry.desired_replicas == 0 and not entry.scale_to_zero and not entry.endpoints:
            raise NoReplicaInTimeError(f"Model {entry.name!r} is suspended: it is set to zero replicas.")
        lease = self._dispatcher.try_acquire(entry, request.route, excluded)
        if lease is not None:
            return lease
        waiting = asyncio.ensure_future(self._dispatcher.acquire(entry, request.route, request.turn, excluded))
        began = self._clock()
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=self._settings.heartbeat_interval)
                if not waiting.done() and request.stream:
                    await self._heartbeat(exchange, entry)
            exchange.held_s += self._clock() - began
            self._metrics.held.labels(entry.name).observe(self._clock() - began)
            return waiting.result()
        except asyncio.CancelledError:
            exchange.held_s += self._clock() - began
            if not waiting.cancel() and waiting.exception() is None:
                self._dispatcher.abandoned(waiting.result())
                self._dispatcher.release(waiting.result())
            raise

    async def _heartbeat(self, exchange: Exchange, entry: ModelEntry) -> None:
        """A comment line: keeps proxies and clients from giving up, and says why it takes so long."""
        if not exchange.started:
            await exchange.start_stream()
        state = "a free replica" if entry.ready else "a replica to start"
        await exchange.write(f": waiting for {state}, {self._dispatcher.position(entry.name)} in line\n\n".encode())

    # ---- one attempt on one replica

    async def _attempt(self, exchange: Exchange, request: Forward, lease: Lease, may_retry: bool) -> None:
        connection: UpstreamConnection | None = None
        sent_at = self._clock()
        try:
            connection, head = await self._send(exchange, request, lease, may_retry)
            exchange.upstream_wait_s += self._clock() - sent_at
            if head.status in REFUSED and may_retry and self._others(lease):
                if head.status == 503:
                    self._failed(lease)
                raise _RetryError(f"status_{head.status}", f"refused with {head.status}")
            if head.status >= 500 and head.status != 503:
                self._failed(lease)
            else:
                self._dispatcher.first_byte(lease)
            await self._relay(exchange, request, lease, connection, head)
            self._dispatcher.completed(lease)
            self._learn(request, lease)
        except asyncio.CancelledError:
            self._dispatcher.abandoned(lease)
            raise
        finally:
            if connection is not None:
                self._pool.give_back(lease.endpoint, connection)

    async def _send(
        self, exchange: Exchange, request: Forward, lease: Lease, may_retry: bool
    ) -> tuple[UpstreamConnection, ResponseHead]:
        """Connect, write, await the head."""
        try:
            connection = await self._pool.connect(lease.endpoint)
        except ConnectError as error:
            self._upstream_error(lease, "connect", error)
            if may_retry:
                raise _RetryError("connect", str(error)) from error
            raise self._unreachable(lease) from error
        try:
            return connection, await self._await_head(exchange, request, lease, connection, may_retry)
        except ConnectionLostError as error:
            self._pool.forget(lease.endpoint)
            if not error.reused:  # a reused one may just have been closed for idleness: no fault of the replica
                self._upstream_error(lease, "lost", error)
            if may_retry:
                raise _RetryError("lost", "connection lost before the first byte") from error
            raise self._unreachable(lease) from error
        except UpstreamError as error:
            self._upstream_error(lease, "broken", error)
            raise self._unreachable(lease) from error

    async def _await_head(
        self, exchange: Exchange, request: Forward, lease: Lease, connection: UpstreamConnection, may_retry: bool
    ) -> ResponseHead:
        per_try = request.entry.retry.per_try_timeout_s
        timeout_s = min(per_try or self._settings.first_byte_timeout, self._settings.first_byte_timeout)
        unanswered = self._unanswered.setdefault(lease.endpoint.id, set())
        unanswered.add(connection)
        try:
            async with asyncio.timeout(timeout_s):
                return await connection.send(self._head_bytes(exchange, request, lease), request.body)
        except TimeoutError:
            connection.abort()
            self._upstream_error(lease, "first_byte", None)
            if per_try is not None and may_retry:
                raise _RetryError("per_try_timeout", f"no first byte within {timeout_s:g} s") from None
            raise UpstreamDeadlineError(
                f"Model {lease.entry.name!r} did not begin to answer within {timeout_s:g} s."
            ) from None
        except BaseException:
            connection.abort()
            raise
        finally:
            unanswered.discard(connection)

    def _on_change(self, snapshot: Snapshot) -> None:
        """Requests that a vanished replica has not begun to answer go elsewhere, even if its machine is just silent."""
        alive = {e.id for entry in snapshot.models.values() for e in entry.endpoints}
        for gone in [endpoint_id for endpoint_id in self._unanswered if endpoint_id not in alive]:
            for connection in self._unanswered.pop(gone):
                connection.abort()

    def _head_bytes(self, exchange: Exchange, request: Forward, lease: Lease) -> bytes:
        host, port, _ = lease.endpoint.address
        left_s = self._settings.request_timeout - (self._clock() - exchange.started_at)
        own = [
            (b"x-request-id", exchange.request_id.encode()),
            (b"traceparent", exchange.trace.header),
            (b"x-octavo-deadline-ms", b"%d" % max(1, int(left_s * 1e3))),
        ]
        if lease.endpoint.cache_events is not None and request.route.prefix:
            own.append((PREFIX, prefix_value(request.route.prefix, request.prompt_bytes)))
        if self._may_resume(exchange, request):
            own.append((RESUMABLE, b"1"))
        if request.usage_id:
            own.append((b"x-octavo-usage-id", request.usage_id.encode()))
        if request.identity is not None:
            own.append((b"x-octavo-tenant", request.identity.tenant.name.encode()))
            own.append((b"x-octavo-priority", b"%d" % request.turn.priority))
        query: bytes = exchange.scope["query_string"]
        target: bytes = exchange.scope.get("raw_path") or exchange.path.encode()
        return headers.request_head(
            exchange.method,
            target + b"?" + query if query else target,
            f"{host}:{port}",
            exchange.headers,
            len(request.body),
            own,
        )

    def _may_resume(self, exchange: Exchange, request: Forward) -> bool:
        return (
            self._settings.resume
            and request.stream
            and exchange.path in ENDS_WITH_DONE
            and request.entry.retry.attempts > 1
        )

    # ---- the answer

    async def _relay(
        self, exchange: Exchange, request: Forward, lease: Lease, connection: UpstreamConnection, head: ResponseHead
    ) -> None:
        is_stream = (head.get(b"content-type") or b"").startswith(EVENT_STREAM)
        if exchange.started and not is_stream:
            await refusal_in_stream(exchange, connection)
            return
        progress = request.progress
        if progress.resumes and head.get(RESUMED) is None:  # it would begin anew
            connection.abort()
            raise self._incomplete()
        progress.begin(head)
        if not exchange.started:
            exchange.streaming = is_stream
            await exchange.start(
                head.status, headers.response_headers(head.headers, self._own(exchange, lease), is_stream=is_stream)
            )
        try:
            await relay_answer(exchange, connection, head, request.meter, progress, self._settings.idle_timeout)
        except UpstreamError as error:
            self._upstream_error(lease, "lost_midway", error)
            if progress.can_resume:
                raise _ResumeError(str(error)) from error
            raise self._incomplete() from error
        await exchange.finish()

    def _learn(self, request: Forward, lease: Lease) -> None:
        """Compare the engine's cached tokens with what routing believed."""
        meter, prefix = request.meter, request.route.prefix
        if meter.known and meter.prompt_tokens and prefix:
            cached = meter.cached_tokens / meter.prompt_tokens
            self._index.observe(lease.endpoint.id, lease.choice.matched_blocks, len(prefix), cached)

    def _own(self, exchange: Exchange, lease: Lease) -> Headers:
        """Server-Timing tells where the time before the first byte went."""
        own_s = self._clock() - exchange.started_at - exchange.held_s - exchange.upstream_wait_s
        self._metrics.overhead.observe(own_s)
        timing = (
            f"gateway;dur={own_s * 1e3:.2f}, hold;dur={exchange.held_s * 1e3:.2f}, "
            f"replica;dur={exchange.upstream_wait_s * 1e3:.2f}"
        )
        own: Headers = [(b"x-request-id", exchange.request_id.encode()), (b"server-timing", timing.encode())]
        own += exchange.own_headers
        if self._settings.debug_headers:
            own.append((b"x-octavo-replica", lease.endpoint.id.encode()))
            own.append((b"x-octavo-route", lease.choice.reason.encode()))
        return own

    # ---- failures

    def _others(self, lease: Lease) -> bool:
        entry = self._registry.snapshot.models.get(lease.entry.name)
        return entry is not None and any(e.id != lease.endpoint.id for e in entry.ready)

    def _failed(self, lease: Lease) -> None:
        if self._dispatcher.failed(lease):
            log.warning("replica %s of model %s is ejected for a while", lease.endpoint.id, lease.entry.name)
            self._metrics.ejections.labels(lease.entry.name).inc()

    def _upstream_error(self, lease: Lease, kind: str, error: Exception | None) -> None:
        self._metrics.upstream_errors.labels(lease.entry.name, kind).inc()
        log.warning("replica %s: %s", lease.endpoint.id, error or f"{kind} deadline passed")
        self._failed(lease)

    def _incomplete(self) -> GatewayError:
        return UpstreamFailedError("The replica that was answering this request failed; the answer is incomplete.")

    def _unreachable(self, lease: Lease) -> GatewayError:
        return UpstreamFailedError(
            f"Model {lease.entry.name!r}: no replica could answer this request.", retry_after_s=1.0
        )


def wants_json(exchange: Exchange) -> bool:
    """True when the request's body is declared as JSON (and not compressed)."""
    content_type = header(exchange.headers, b"content-type") or b""
    encoding = header(exchange.headers, b"content-encoding")
    return content_type.split(b";")[0].strip().lower() == b"application/json" and encoding in (None, b"identity")
