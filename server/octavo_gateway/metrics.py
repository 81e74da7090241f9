"""Prometheus metrics of the gateway. Labels are bounded: model names come from the registry, never from a request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo_gateway.canary import FIRST_BYTE_BOUNDS_S, Track, TrackRecord
from octavo_gateway.load import LoadBook
from octavo_gateway.registry import EndpointState, Registry
from octavo_gateway.signals import GatewaySignals
from octavo_gateway.usage import Ledger

Tracks = Callable[[str], Mapping[Track, TrackRecord]]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
OVERHEAD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)


class Metrics:
    """One registry per gateway, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter(
            "octavo_gateway_requests", "Requests ended, by outcome.", ["model", "outcome", "status"], registry=r
        )
        self.ttfb = Histogram(
            "octavo_gateway_time_to_first_byte_seconds",
            "From the request's arrival to the first byte sent to the client.",
            ["model"],
            buckets=SECONDS,
            registry=r,
        )
        self.duration = Histogram(
            "octavo_gateway_request_duration_seconds",
            "From the request's arrival to its end.",
            ["model"],
            buckets=SECONDS,
            registry=r,
        )
        self.held = Histogram(
            "octavo_gateway_hold_seconds",
            "Time requests waited in the gateway for a replica.",
            ["model"],
            buckets=SECONDS,
            registry=r,
        )
        self.overhead = Histogram(
            "octavo_gateway_overhead_seconds",
            "Time the gateway itself added before the first byte.",
            buckets=OVERHEAD_SECONDS,
            registry=r,
        )
        self.retries = Counter("octavo_gateway_retries", "Requests sent again.", ["model", "reason"], registry=r)
        self.ejections = Counter("octavo_gateway_ejections", "Replicas ejected as outliers.", ["model"], registry=r)
        self.upstream_errors = Counter(
            "octavo_gateway_upstream_errors", "Failed exchanges with replicas.", ["model", "kind"], registry=r
        )
        self.response_bytes = Counter(
            "octavo_gateway_response_bytes", "Body bytes streamed to clients.", ["model"], registry=r
        )
        self._tokens = Counter(
            "octavo_gateway_tokens", "Tokens served, as the engines counted them.", ["model", "kind"], registry=r
        )
        self.shared_limit_failures = Counter(
            "octavo_gateway_shared_limit_failures", "Calls to Redis that failed; limits were local then.", registry=r
        )
        self.cache_resyncs = Counter(
            "octavo_gateway_cache_resyncs", "Replicas asked for all they have cached.", ["reason"], registry=r
        )
        self.draining = Gauge("octavo_gateway_draining", "1 while this gateway shuts down.", registry=r)

    def tokens(self, model: str, prompt: int, cached: int, output: int) -> None:
        """Count one request's tokens."""
        for kind, count in (("prompt", prompt), ("cached", cached), ("output", output)):
            if count:
                self._tokens.labels(model, kind).inc(count)

    def watch(
        self, registry: Registry, loads: LoadBook, signals: Callable[[str], GatewaySignals], tracks: Tracks
    ) -> None:
        """Export the live view of models and replicas, read when scraped."""
        self.registry.register(_LiveView(registry, loads, signals))
        self.registry.register(_CanaryView(registry, tracks))

    def watch_ledger(self, ledger: Ledger) -> None:
        """Export how the ledger gets on with its database, read when scraped."""
        self.registry.register(_LedgerView(ledger))

    def page(self) -> bytes:
        """The text page of /metrics."""
        return generate_latest(self.registry)


class _LiveView(Collector):
    def __init__(self, registry: Registry, loads: LoadBook, signals: Callable[[str], GatewaySignals]) -> None:
        self._registry = registry
        self._loads = loads
        self._signals = signals

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        per_model = {
            name: GaugeMetricFamily(f"octavo_gateway_{name}", text, labels=["model", "namespace"])
            for name, text in _SIGNALS.items()
        }
        endpoints = GaugeMetricFamily(
            "octavo_gateway_endpoints", "Replicas by state.", labels=["model", "namespace", "state"]
        )
        outstanding = GaugeMetricFamily(
            "octavo_gateway_endpoint_outstanding", "Requests in a replica, as estimated.", labels=["model", "endpoint"]
        )
        arrivals = CounterMetricFamily(
            "octavo_gateway_arrivals", "Requests that arrived, held ones included.", labels=["model", "namespace"]
        )
        for entry in self._registry.snapshot.models.values():
            signals = self._signals(entry.name)
            labels = [entry.name, entry.namespace]
            for name, family in per_model.items():
                family.add_metric(labels, float(getattr(signals, _FIELD.get(name, name))))
            arrivals.add_metric(labels, signals.arrivals_total)
            for state in EndpointState:
                count = sum(1 for e in entry.endpoints if e.state is state)
                endpoints.add_metric([*labels, state.value], count)
            for endpoint in entry.endpoints:
                outstanding.add_metric([entry.name, endpoint.id], self._loads[endpoint.id].outstanding)
        yield from (*per_model.values(), arrivals, endpoints, outstanding)


class _LedgerView(Collector):
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(
            "octavo_gateway_ledger_failures",
            "Times the ledger's database could not take records in.",
            value=self._ledger.failures,
        )
        yield GaugeMetricFamily(
            "octavo_gateway_ledger_spool_bytes",
            "Bytes of usage records that wait for the ledger's database.",
            value=self._ledger.spool_bytes,
        )


class _CanaryView(Collector):
    """Both tracks of every model that has a canary, for whoever judges it."""

    def __init__(self, registry: Registry, tracks: Tracks) -> None:
        self._registry = registry
        self._tracks = tracks

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        labels = ["model", "namespace", "track"]
        requests = CounterMetricFamily("octavo_gateway_track_requests", "Attempts on a revision.", labels=labels)
        errors = CounterMetricFamily("octavo_gateway_track_errors", "Attempts that it failed.", labels=labels)
        first_byte = HistogramMetricFamily(
            "octavo_gateway_track_first_byte_seconds", "From its request to its first byte.", labels=labels
        )
        for entry in self._registry.snapshot.models.values():
            if entry.canary_weight is None:
                continue
            for track, record in self._tracks(entry.name).items():
                values = [entry.name, entry.namespace, track.value]
                requests.add_metric(values, record.requests)
                errors.add_metric(values, record.errors)
                bounds = [*map(str, FIRST_BYTE_BOUNDS_S), "+Inf"]
                buckets = list(zip(bounds, accumulate(record.buckets), strict=True))
                first_byte.add_metric(values, buckets, record.seconds)
        yield from (requests, errors, first_byte)


_SIGNALS = {
    "requests_held": "Requests waiting in the gateway for a replica.",
    "requests_in_flight": "Requests sent to replicas and not ended.",
    "arrival_rate": "Requests arriving per second, smoothed over a minute.",
    "completion_rate": "Requests answered per second, smoothed over a minute.",
    "mean_service_seconds": "Mean time a replica takes for a request, without the wait in the gateway.",
    "oldest_held_seconds": "How long the oldest held request has waited.",
    "activation": "1 while requests wait and no replica is ready.",
}
_FIELD = {
    "requests_held": "held",
    "requests_in_flight": "in_flight",
    "mean_service_seconds": "mean_service_s",
    "oldest_held_seconds": "oldest_held_s",
}
