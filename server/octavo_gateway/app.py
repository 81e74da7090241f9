"""The gateway as one ASGI application: routes, health, metrics, the merged model list, and the data path."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

from octavo_batches.runner import PRIORITY
from octavo_gateway.access_log import log_exchange
from octavo_gateway.accounts import Accounts
from octavo_gateway.asgi import Receive, Scope, Send, header
from octavo_gateway.batches import BATCH_PATHS, GatewayBatches
from octavo_gateway.cache_events import CacheFollower
from octavo_gateway.dispatcher import Dispatcher, Turn
from octavo_gateway.errors import (
    GatewayDrainingError,
    GatewayError,
    MethodNotAllowedError,
    RouteNotFoundError,
    UnsupportedMediaTypeError,
)
from octavo_gateway.exchange import ClientGoneError, Exchange
from octavo_gateway.inspection import APIS, Api, Inspection, inspect_body
from octavo_gateway.load import LoadBook
from octavo_gateway.metrics import Metrics
from octavo_gateway.outliers import OutlierDetector
from octavo_gateway.pages import Page, Pages, octavo_version
from octavo_gateway.progress import Progress
from octavo_gateway.proxy import Forward, Proxy, wants_json
from octavo_gateway.registry import Registry, Strategy
from octavo_gateway.reports import ReportPoller
from octavo_gateway.routing import BLOCK_TOKENS, PrefixIndex, Router, RouteRequest
from octavo_gateway.settings import GatewaySettings
from octavo_gateway.signals import GatewaySignals
from octavo_gateway.tenancy import Identity, TenantDirectory
from octavo_gateway.tenancy.shared import SharedLimiter
from octavo_gateway.tracing import Tracing
from octavo_gateway.upstream import UpstreamPool, replica_context
from octavo_gateway.usage import Ledger, PriceTable
from octavo_gateway.usage.collector import UsageCollector
from octavo_gateway.usage.meter import ask_for_usage
from octavo_gateway.web import state_document
from octavo_gateway.web.usage import UsageThisMonth
from octavo_gateway.workers.seat import Seat
from octavo_gateway.workers.whole import Whole

log = logging.getLogger("octavo.gateway")

Clock = Callable[[], float]


OPEN_INFERENCE = re.compile(
    r"/v2/models/([^/]+)(?:/versions/[^/.]+)?(?:/(?:infer|generate|generate_stream|ready|stats|config|trace/setting))?"
)
"""What of the Open Inference Protocol is forwarded; group 1 is the model. Nothing else of a replica can be reached."""

TELLS_USAGE_IF_ASKED = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Streams that carry token counts only if `stream_options.include_usage` asks for them."""


def create_app(
    settings: GatewaySettings,
    registry: Registry,
    *,
    directory: TenantDirectory | None = None,
    ledger: Ledger | None = None,
    prices: PriceTable | None = None,
    seat: Seat | None = None,
    clock: Clock = time.monotonic,
) -> Gateway:
    """A gateway over the models of `registry`; the returned object is the ASGI application.

    Without a `directory` of tenants it is open to everybody; without a `ledger` nothing is recorded. As a worker it
    takes its `seat` among its peers.
    """
    metrics = Metrics()
    accounts = Accounts(
        metrics, clock, directory=directory, ledger=ledger, prices=prices,
        num_sharing=seat.count if seat is not None and settings.redis_url is None else 1,
    )  # fmt: skip
    return Gateway(settings, registry, accounts, metrics, seat, clock)


class Gateway:
    """ASGI application. `start` and `close` run its background work; `GatewayServer` calls them."""

    def __init__(
        self,
        settings: GatewaySettings,
        registry: Registry,
        accounts: Accounts,
        metrics: Metrics,
        seat: Seat | None,
        clock: Clock,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.accounts = accounts
        self.metrics = metrics
        self.loads = LoadBook()
        self.index = PrefixIndex(settings.prefix_index_blocks)
        self.dispatcher = Dispatcher(
            registry,
            Router(self.index, random.Random()),  # noqa: S311
            self.loads,
            OutlierDetector(),
            clock,
            num_sharing=seat.count if seat is not None else 1,
        )
        self.whole = Whole(
            seat,
            page=metrics.page,
            signals=lambda: [self.signals(model) for model in registry.snapshot.models],
            running=accounts.limiter.running,
        )
        self.pool = UpstreamPool(
            connect_timeout_s=settings.connect_timeout,
            keep_alive_s=settings.upstream_keep_alive,
            tls=replica_context(settings.upstream_ca, settings.upstream_certificate, settings.upstream_key),
            server_name=settings.upstream_server_name,
        )
        self.leaving = False  # readiness says no
        self.draining = False  # new requests are refused
        self._clock = clock
        self._exchanges: set[Exchange] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.proxy = Proxy(settings, registry, self.dispatcher, self.pool, self.index, self.metrics, clock)
        self.cache_follower = CacheFollower(registry, self.index, lambda why: metrics.cache_resyncs.labels(why).inc())
        self.usage_this_month = UsageThisMonth(lambda: accounts.ledger, clock)
        self._tracing = Tracing(settings.otlp_endpoint, octavo_version())
        if settings.redis_url is not None:
            failures = metrics.shared_limit_failures
            accounts.shared = SharedLimiter(settings.redis_url, settings.request_timeout, failures.inc)
        self._background: list[asyncio.Task[None]] = []
        self.batches = None if settings.batch_folder is None else GatewayBatches(self, settings.batch_folder)
        accounts.collector = UsageCollector(self.pool, clock)
        self._pages = Pages(self)
        self.metrics.watch(registry, self.loads, self.dispatcher.signals, self.dispatcher.tracks)

    # ---- for the process around it

    def signals(self, model: str) -> GatewaySignals:
        """Held and flying requests and rates of a model, for the autoscaler."""
        return self.dispatcher.signals(model)

    async def state(self, identity: Identity | None = None) -> bytes:
        """What the web page shows: the models of this caller, of all for None."""
        models = self.registry.snapshot.models.values()
        return state_document(
            [entry for entry in models if identity is None or identity.tenant.may_use(entry.name)],
            self.loads,
            await self.whole.signals(),
            draining=self.leaving,
            usage=self.accounts.ledger is not None,
            version=self.version,
        )

    @property
    def synced(self) -> bool:
        """True once discovery has told what models and what tenants there are."""
        directory = self.accounts.directory
        return self.registry.synced and (directory is None or directory.known)

    @property
    def version(self) -> str:
        """Version of this distribution."""
        return octavo_version()

    @property
    def in_flight(self) -> int:
        """Requests not ended, held ones included."""
        return len(self._exchanges)

    async def start(self) -> None:
        """Begin to read the replicas' load, and to settle what an earlier gateway left open."""
        poller = ReportPoller(
            self.registry,
            self.loads,
            self.pool,
            interval_s=self.settings.report_interval,
            clock=self._clock,
            on_report=self.dispatcher.loads_changed,
            on_restart=self.cache_follower.replica_restarted,
            on_cache_size=lambda id_, tokens: self.index.expect(id_, int(tokens / BLOCK_TOKENS)),
        )
        await self.whole.start()
        self._background = [asyncio.create_task(poller.run()), asyncio.create_task(self.cache_follower.run())]
        if self.batches is not None:
            self._background.append(asyncio.create_task(self.batches.run()))
        if self.accounts.ledger is not None:
            self._background.append(asyncio.create_task(self.accounts.follow_ledger(self.registry)))

    async def drain(self, timeout_s: float, propagation_s: float = 0.0) -> bool:
        """Say not ready, after `propagation_s` refuse new requests with a retryable 503, wait for the running ones.

        After `timeout_s` what still runs is ended with an explicit error. True when all ended by themselves.
        """
        self.leaving = True
        self.metrics.draining.set(1)
        await asyncio.sleep(propagation_s)
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            for exchange in list(self._exchanges):
                exchange.stop(
                    GatewayDrainingError(
                        "The gateway shut down before this request finished; send it again.", retry_after_s=1.0
                    )
                )
            await asyncio.wait_for(self._idle.wait(), 5.0)
            return False
        return True

    async def close(self) -> None:
        """Stop the background work and close idle connections."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self.batches is not None:
            await self.batches.close()
        await self.accounts.close()
        await self.whole.close()
        self.pool.close()
        await asyncio.to_thread(self._tracing.shutdown)

    # ---- ASGI

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, self._clock)
        page = self._pages.find(exchange.path)
        if page is not None:
            await self._serve_page(exchange, page)
            return
        self._exchanges.add(exchange)
        self._idle.clear()
        try:
            await self._serve(exchange)
        finally:
            exchange.unwatch()
            if exchange.on_end is not None:
                exchange.on_end()
            self._exchanges.discard(exchange)
            if not self._exchanges:
                self._idle.set()
            self._account(exchange)

    async def _serve_page(self, exchange: Exchange, page: Page) -> None:
        try:
            await self._pages.serve(exchange, page)
        except GatewayError as error:
            await exchange.fail(error)

    async def _serve(self, exchange: Exchange) -> None:
        """Run the data path; whatever ends it, the client hears of it once."""
        try:
            await self._dispatch(exchange)
            exchange.outcome = "ok" if exchange.status < 400 else "refused" if exchange.status < 500 else "failed"
        except asyncio.CancelledError:
            cause = exchange.cause
            if cause is None:
                raise
            if isinstance(cause, GatewayError):
                await self._fail(exchange, cause)
            else:
                exchange.outcome = "cancelled"
        except ClientGoneError:
            exchange.outcome = "cancelled"
        except GatewayError as error:
            await self._fail(exchange, error)
        except Exception as error:
            # Values of variables stay out of the log: they may hold prompt text.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("request %s: internal error %s\n%s", exchange.request_id, type(error).__name__, frames)
            message = f"Internal error; the gateway's log has the details under request id {exchange.request_id}."
            await self._fail(exchange, GatewayError(message))

    async def _fail(self, exchange: Exchange, error: GatewayError) -> None:
        exchange.outcome = "failed" if error.status >= 500 else "refused"
        await exchange.fail(error)

    async def _dispatch(self, exchange: Exchange) -> None:
        if self.draining:
            raise GatewayDrainingError("This gateway is shutting down; send the request again.", retry_after_s=1.0)
        api = APIS.get(exchange.path)
        if api is not None:
            await self._openai(exchange, api)
        elif exchange.path.startswith(BATCH_PATHS) and self.batches is not None:
            await self.batches.serve(exchange, self.accounts.authenticate(exchange))
        elif match := OPEN_INFERENCE.fullmatch(exchange.path):
            await self._open_inference(exchange, match[1])
        else:
            raise RouteNotFoundError(f"There is no {exchange.method} {exchange.path[:200]} here.")

    async def _openai(self, exchange: Exchange, api: Api) -> None:
        """Paths whose JSON body names the model."""
        identity = self.accounts.authenticate(exchange)
        if exchange.method != "POST":
            raise MethodNotAllowedError(f"{exchange.method} is not allowed on {exchange.path}; use POST.")
        if not wants_json(exchange):
            raise UnsupportedMediaTypeError("Send the body as uncompressed application/json.")
        body = await exchange.read_body(self.settings.max_body_bytes, self.settings.body_timeout)
        exchange.watch(self.settings.request_timeout)
        seen = inspect_body(body, api)
        resolved = self.proxy.resolve(seen.model, identity)
        entry = resolved.entry
        salt = identity.tenant.name if identity else ""
        prefix = seen.prefix(entry.name, resolved.adapter, salt) if entry.strategy is Strategy.PREFIX_AWARE else ()
        session = header(exchange.headers, entry.session_header.encode())
        stream = seen.stream and api is Api.GENERATE
        route = RouteRequest(
            entry.name,
            prefix,
            session.decode("latin-1") if session else None,
            resolved.adapter,
            seen.prompt_tokens if stream else 0,
        )
        strip = False
        if stream and self.accounts.counting and exchange.path in TELLS_USAGE_IF_ASKED:
            body, strip = ask_for_usage(body)
        request = Forward(
            resolved, body, route, _turn(identity, seen, exchange.batch is not None), stream, identity,
            progress=Progress(shows_tokens=seen.shows_tokens), prompt_bytes=len(seen.prompt),
        )  # fmt: skip
        await self._charged(exchange, request, seen, strip)

    async def _open_inference(self, exchange: Exchange, name: str) -> None:
        """Open Inference Protocol: the path names the model, the body may be binary."""
        identity = self.accounts.authenticate(exchange)
        if exchange.method not in ("GET", "POST"):
            raise MethodNotAllowedError(f"{exchange.method} is not allowed on {exchange.path[:200]}.")
        if header(exchange.headers, b"content-encoding") not in (None, b"identity"):
            raise UnsupportedMediaTypeError("Send the body uncompressed.")
        body = await exchange.read_body(self.settings.max_body_bytes, self.settings.body_timeout)
        exchange.watch(self.settings.request_timeout)
        resolved = self.proxy.resolve(name, identity)
        route = RouteRequest(resolved.entry.name, adapter=resolved.adapter)
        stream = exchange.path.endswith("/generate_stream")
        request = Forward(resolved, body, route, _turn(identity, None, False), stream, identity)
        if exchange.method == "GET":
            await self.proxy.forward(exchange, request)
        else:
            await self._charged(exchange, request, None, False)

    async def _charged(self, exchange: Exchange, request: Forward, seen: Inspection | None, strip: bool) -> None:
        """Forward within the tenant's limits, and account for it whatever becomes of it."""
        if not self.accounts.counting:
            await self.proxy.forward(exchange, request)
            return
        try:
            charge = await self.accounts.open(exchange, request.identity, request.resolved, seen, strip)
        finally:
            exchange.own_headers = self.accounts.limit_headers(request.identity)
        exchange.on_end = lambda: self.accounts.settle(charge, exchange, exchange.outcome or "interrupted")
        await self.proxy.forward(exchange, replace(request, meter=charge.meter, usage_id=charge.begun.id))

    def _account(self, exchange: Exchange) -> None:
        model = exchange.model
        self.metrics.requests.labels(model, exchange.outcome, str(exchange.status)).inc()
        if model:
            self.metrics.duration.labels(model).observe(self._clock() - exchange.started_at)
            self.metrics.response_bytes.labels(model).inc(exchange.bytes_sent)
            if exchange.bytes_sent:
                self.metrics.ttfb.labels(model).observe(exchange.first_byte_at - exchange.started_at)
        self._tracing.record(exchange, self._clock())
        if self.settings.access_log:
            log_exchange(exchange, self._clock())


def _turn(identity: Identity | None, seen: Inspection | None, in_batch: bool) -> Turn:
    """The request's place in the line: weight and priority come from the tenant, never beyond what it may ask; batches
    come after everybody."""
    cost, asked = (seen.cost, seen.priority) if seen is not None else (1.0, None)
    if in_batch:
        asked = PRIORITY
    if identity is None:
        return Turn(cost=cost, priority=max(0, asked or 0))
    tenant = identity.tenant
    return Turn(
        tenant=tenant.name,
        weight=tenant.weight,
        priority=tenant.queue_priority(asked),
        cost=cost,
        max_queued=tenant.limits.max_queued_requests,
    )
