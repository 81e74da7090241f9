"""One span per request that the gateway forwards, with its phases, joined to the caller's and the engine's trace.

Off unless an OTLP endpoint is set. Spans are made when a request has ended, so its bytes pay nothing for them. No
prompt, no answer and no key ever becomes an attribute.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from octavo_gateway.exchange import Exchange

EXPORT_TIMEOUT_S = 3.0
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""Names of the GenAI semantic conventions for what a path asks for."""


class Tracing:
    """Exports to one OTLP/HTTP collector; does nothing without an endpoint."""

    def __init__(self, endpoint: str | None, version: str) -> None:
        self.enabled = endpoint is not None
        if endpoint is None:
            return
        base = endpoint.rstrip("/").removesuffix("/v1/traces")
        self._ids = _ChosenIds()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "octavo-gateway", "service.version": version}),
            id_generator=self._ids,
        )
        exporter = OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("octavo.gateway", version)

    def record(self, exchange: Exchange, now: float) -> None:
        """Record an ended exchange; `now` is monotonic seconds."""
        if not self.enabled or not exchange.model:
            return
        offset_ns = time.time_ns() - int(now * 1e9)

        def wall_ns(monotonic_s: float) -> int:
            return int(monotonic_s * 1e9) + offset_ns

        # The engine was told this span's id in `traceparent` before the span existed.
        self._ids.choose(int(exchange.trace.trace_id, 16), int(exchange.trace.span_id, 16))
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.path}",
            context=_parent(exchange),
            kind=SpanKind.SERVER,
            start_time=wall_ns(exchange.started_at),
            attributes=_operation(exchange)
            | {
                "http.request.method": exchange.method,
                "url.path": exchange.path,
                "http.response.status_code": exchange.status,
                "gen_ai.request.model": exchange.model,
                "octavo.outcome": exchange.outcome,
                "octavo.tenant": exchange.tenant,
                "octavo.replica": exchange.endpoint,
                "octavo.route": exchange.route_reason,
                "octavo.attempts": exchange.attempts,
                "octavo.request_id": exchange.request_id,
            },
        )
        if exchange.outcome == "failed":
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        for name, start, end in _phases(exchange, now):
            self._tracer.start_span(name, context=inside, start_time=wall_ns(start)).end(wall_ns(end))
        span.end(wall_ns(now))

    def shutdown(self) -> None:
        """Send what is left; takes a few seconds at most when the collector is away."""
        if self.enabled:
            self._provider.shutdown()


def _operation(exchange: Exchange) -> dict[str, str]:
    name = OPERATIONS.get(exchange.path)
    return {"gen_ai.operation.name": name} if name is not None else {}


class _ChosenIds(IdGenerator):
    """Random ids, except that the next trace and span id may be chosen."""

    def __init__(self) -> None:
        self._random = RandomIdGenerator()
        self._trace: int | None = None
        self._span: int | None = None

    def choose(self, trace_id: int, span_id: int) -> None:
        self._trace, self._span = trace_id, span_id

    def generate_span_id(self) -> int:
        chosen, self._span = self._span, None
        return self._random.generate_span_id() if chosen is None else chosen

    def generate_trace_id(self) -> int:
        chosen, self._trace = self._trace, None
        return self._random.generate_trace_id() if chosen is None else chosen


def _parent(exchange: Exchange) -> Context | None:
    if not exchange.trace.parent_span_id:
        return None
    caller = SpanContext(
        trace_id=int(exchange.trace.trace_id, 16),
        span_id=int(exchange.trace.parent_span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(int(exchange.trace.flags, 16)),
    )
    return set_span_in_context(NonRecordingSpan(caller))


def _phases(exchange: Exchange, now: float) -> Sequence[tuple[str, float, float]]:
    """Consecutive phases that cover arrival to end."""
    held_at = min(now, exchange.started_at + max(0.0, exchange.admitted_s))
    sent_at = min(now, held_at + exchange.held_s)
    answered_at = min(now, sent_at + exchange.upstream_wait_s)
    phases = (
        ("admit", exchange.started_at, held_at),
        ("hold", held_at, sent_at),
        ("wait for replica", sent_at, answered_at),
        ("stream", answered_at, now),
    )
    return [(name, start, end) for name, start, end in phases if end > start]
