"""Traces of what the operator does: one for each reconcile and each change of scale, with every API call inside it.

Off unless an OTLP endpoint is set. Names of objects, numbers and reasons are attributes; specs, secrets and tokens
never are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NoOpTracer, SpanKind, Tracer

EXPORT_TIMEOUT_S = 3.0
NO_TRACER: Tracer = NoOpTracer()


def new_tracer(endpoint: str) -> Tracer:
    """Exports to an OTLP/HTTP collector such as `http://otel:4318`; makes nothing where the endpoint is empty. What is
    waiting is sent when the process ends."""
    if not endpoint:
        return NO_TRACER
    resource = Resource.create({"service.name": "octavo-operator", "service.version": version("octavo")})
    provider = TracerProvider(resource=resource)
    base = endpoint.rstrip("/").removesuffix("/v1/traces")
    exporter = OTLPSpanExporter(endpoint=f"{base}/v1/traces", timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider.get_tracer("octavo.operator", version("octavo"))


@contextmanager
def api_call(tracer: Tracer, method: str, path: str) -> Iterator[None]:
    """A call to the API server as part of the trace that is under way; watches and leases belong to none."""
    if not trace.get_current_span().is_recording():
        yield
        return
    with tracer.start_as_current_span(
        f"{method} {path}", kind=SpanKind.CLIENT, attributes={"http.request.method": method, "url.path": path}
    ):
        yield
