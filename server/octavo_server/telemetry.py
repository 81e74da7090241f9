"""OpenTelemetry: one span per request and per sequence with its phases, and latencies, in GenAI semantic conventions.

Off unless an OTLP endpoint is set. Spans are made when a sequence has ended, so tokens cost nothing. No prompt, no text
and no argument ever becomes an attribute.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from octavo_engine.sampling_params import SamplingParams

PROVIDER_NAME = "octavo"
_EXPORT_TIMEOUT_S = 3.0
_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class SequenceTimes:
    """Monotonic seconds of one sequence; `first_token_at` None when it never came, `ended_at` once its text is out."""

    arrived_at: float
    submitted_at: float
    queue_time_s: float
    first_token_at: float | None
    last_output_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class SequenceFacts:
    """What a sequence's span says of it."""

    operation: str
    model: str
    request_id: str
    sampling: SamplingParams
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    finish_reason: str
    failed: bool


class Telemetry:
    """Exports to one OTLP/HTTP collector; does nothing without an endpoint."""

    def __init__(self, endpoint: str | None, version: str) -> None:
        self.enabled = endpoint is not None
        if endpoint is None:
            return
        resource = Resource.create({"service.name": "octavo", "service.version": version})
        base = endpoint.rstrip("/").removesuffix("/v1/traces")
        self._tracers = TracerProvider(resource=resource)
        self._tracers.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=_EXPORT_TIMEOUT_S))
        )
        self._tracer = self._tracers.get_tracer("octavo", version)
        reader = PeriodicExportingMetricReader(
            OTLPMetricExporter(endpoint=f"{base}/v1/metrics", timeout=_EXPORT_TIMEOUT_S)
        )
        self._meters = MeterProvider(metric_readers=[reader], resource=resource)
        meter = self._meters.get_meter("octavo", version)
        self._ttft = meter.create_histogram("gen_ai.server.time_to_first_token", "s", "Time to the first token.")
        self._tpot = meter.create_histogram("gen_ai.server.time_per_output_token", "s", "Time per token after it.")
        self._duration = meter.create_histogram("gen_ai.server.request.duration", "s", "Time to the last token.")
        self._usage = meter.create_histogram("gen_ai.client.token.usage", "{token}", "Tokens of a request.")

    def start_request(self, method: str, route: str, headers: Mapping[str, str]) -> Span | None:
        """The span of an HTTP request, a child of the caller's `traceparent`."""
        if not self.enabled:
            return None
        attributes: dict[str, AttributeValue] = {"http.request.method": method, "url.path": route}
        return self._tracer.start_span(
            f"{method} {route}", context=_propagator.extract(headers), kind=SpanKind.SERVER, attributes=attributes
        )

    def end_request(self, span: Span | None, status: int) -> None:
        if span is None:
            return
        span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()

    def sequence(self, parent: Context | None, facts: SequenceFacts, times: SequenceTimes) -> None:
        """Record a sequence that has ended: a span, one child for each phase, and the histograms."""
        if not self.enabled:
            return
        offset_ns = time.time_ns() - time.monotonic_ns()

        def wall_ns(monotonic_s: float) -> int:
            return int(monotonic_s * 1e9) + offset_ns

        span = self._tracer.start_span(
            f"{facts.operation} {facts.model}",
            context=parent,
            start_time=wall_ns(times.arrived_at),
            attributes=_attributes(facts),
        )
        if facts.failed:
            span.set_status(StatusCode.ERROR, facts.finish_reason)
        inside = set_span_in_context(span, parent)
        for name, start, end in _phases(times):
            phase = self._tracer.start_span(name, context=inside, start_time=wall_ns(start))
            phase.end(wall_ns(end))
        span.end(wall_ns(times.ended_at))
        self._record(facts, times)

    def shutdown(self) -> None:
        """Send what is left; takes a few seconds at most when the collector is away."""
        if self.enabled:
            self._tracers.shutdown()
            self._meters.shutdown(timeout_millis=3_000)

    def _record(self, facts: SequenceFacts, times: SequenceTimes) -> None:
        shared: dict[str, AttributeValue] = {
            "gen_ai.operation.name": facts.operation,
            "gen_ai.provider.name": PROVIDER_NAME,
            "gen_ai.request.model": facts.model,
        }
        self._duration.record(times.ended_at - times.arrived_at, shared)
        for kind, count in (("input", facts.num_prompt_tokens), ("output", facts.num_output_tokens)):
            self._usage.record(count, {**shared, "gen_ai.token.type": kind})
        if times.first_token_at is None:
            return
        self._ttft.record(times.first_token_at - times.arrived_at, shared)
        if facts.num_output_tokens > 1:
            self._tpot.record((times.last_output_at - times.first_token_at) / (facts.num_output_tokens - 1), shared)


def context_of(span: Span | None) -> Context | None:
    """The context in which children of `span` are made."""
    return None if span is None else set_span_in_context(span)


def context_from(headers: Mapping[str, str]) -> Context | None:
    """The caller's own context, for transports without a span of ours."""
    return _propagator.extract(headers) if "traceparent" in headers else None


def _phases(times: SequenceTimes) -> list[tuple[str, float, float]]:
    """Consecutive phases that cover arrival to end."""
    scheduled_at = min(times.submitted_at + times.queue_time_s, times.ended_at)
    first_at = times.ended_at if times.first_token_at is None else max(scheduled_at, times.first_token_at)
    phases = [
        ("prepare", times.arrived_at, times.submitted_at),
        ("queue", times.submitted_at, scheduled_at),
        ("prefill", scheduled_at, first_at),
        ("decode", first_at, times.last_output_at),
        ("detokenize", max(first_at, times.last_output_at), times.ended_at),
    ]
    return [(name, start, end) for name, start, end in phases if end > start]


def _attributes(facts: SequenceFacts) -> dict[str, AttributeValue]:
    sampling = facts.sampling
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": facts.operation,
        "gen_ai.provider.name": PROVIDER_NAME,
        "gen_ai.request.model": facts.model,
        "gen_ai.response.model": facts.model,
        "gen_ai.response.id": facts.request_id,
        "gen_ai.response.finish_reasons": [facts.finish_reason],
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.input_tokens": facts.num_prompt_tokens,
        "gen_ai.usage.output_tokens": facts.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": facts.num_cached_tokens,
        "octavo.num_preemptions": facts.num_preemptions,
    }
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    return attributes
