"""What several workers say, as one voice. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from octavo_gateway.signals import GatewaySignals

LARGEST_COUNTS = frozenset(
    {
        "octavo_gateway_activation",
        "octavo_gateway_draining",
        "octavo_gateway_endpoint_outstanding",
        "octavo_gateway_endpoints",
        "octavo_gateway_mean_service_seconds",
        "octavo_gateway_oldest_held_seconds",
    }
)
"""Gauges in which every worker describes the same thing; all other series are parts of a sum."""

Sample = tuple[str, tuple[tuple[str, str], ...]]


def merge_pages(pages: Iterable[bytes], last_words: Iterable[bytes] = ()) -> bytes:
    """Metrics pages in Prometheus' text format as one: counters, histograms and most gauges are added up.

    Of `last_words`, the pages of workers that are gone, only what never shrinks counts.
    """
    families: dict[str, Metric] = {}
    values: dict[str, dict[Sample, float]] = {}
    for alive, page in [*((True, page) for page in pages), *((False, page) for page in last_words)]:
        for family in text_string_to_metric_families(page.decode()):
            if not alive and family.type not in ("counter", "histogram"):
                continue
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged = values.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                before = merged.get(key)
                if before is None:
                    merged[key] = sample.value
                elif family.name in LARGEST_COUNTS:
                    merged[key] = max(before, sample.value)
                else:
                    merged[key] = before + sample.value
    for name, family in families.items():
        for (sample_name, labels), value in values[name].items():
            family.add_sample(sample_name, dict(labels), value)
    registry = CollectorRegistry()
    registry.register(_Merged(list(families.values())))
    return generate_latest(registry)


def merge_signals(parts: Sequence[GatewaySignals]) -> GatewaySignals:
    """One model's signals over all workers; at least one part."""
    held = sum(part.held for part in parts)
    completion_rate = sum(part.completion_rate for part in parts)

    def mean(name: str) -> float:
        """Weighted by how much a worker completes."""
        if completion_rate <= 0:
            return max(float(getattr(part, name)) for part in parts)
        return sum(float(getattr(part, name)) * part.completion_rate for part in parts) / completion_rate

    return replace(
        parts[0],
        held=held,
        in_flight=sum(part.in_flight for part in parts),
        arrivals_total=sum(part.arrivals_total for part in parts),
        completions_total=sum(part.completions_total for part in parts),
        arrival_rate=sum(part.arrival_rate for part in parts),
        completion_rate=completion_rate,
        mean_service_s=mean("mean_service_s"),
        mean_ttfb_s=mean("mean_ttfb_s"),
        oldest_held_s=max(part.oldest_held_s for part in parts),
        seconds_since_arrival=min((part.seconds_since_arrival for part in parts), default=math.inf),
        activation=any(part.activation for part in parts),
    )


class _Merged(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
