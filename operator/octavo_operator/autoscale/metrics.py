"""Read an engine's metrics page (Prometheus text) into the signals, by the runtime's map. Pure text in, numbers out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from octavo_operator.api.serving_runtime import MetricMap, MetricSource
from octavo_operator.autoscale.signals import ReplicaSample

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\S+)?\s*$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r'\\(["\\n])')
MAX_SAMPLES = 20_000


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a metrics page."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Page:
    """A metrics page at a time, by metric name."""

    time: float
    samples: Mapping[str, tuple[Sample, ...]]
    _models: dict[str, dict[str, list[Sample]]] = field(default_factory=dict, compare=False, repr=False)

    def of_model(self, name: str, model: str) -> Sequence[Sample]:
        """Samples of a metric whose label `model` is this one; found without a scan, for pages of many models."""
        index = self._models.get(name)
        if index is None:
            index = self._models[name] = {}
            for sample in self.samples.get(name, ()):
                index.setdefault(sample.labels.get("model", ""), []).append(sample)
        return index.get(model, ())

    def find(self, name: str, labels: Mapping[str, str] | None = None) -> tuple[Sample, ...]:
        """Samples of a metric that carry these labels."""
        wanted = (labels or {}).items()
        return tuple(s for s in self.samples.get(name, ()) if all(s.labels.get(k) == v for k, v in wanted))


@dataclass(frozen=True, slots=True)
class Histogram:
    """Cumulative buckets by upper bound, the count and the sum; the difference of two gives a window."""

    buckets: Mapping[float, float] = field(default_factory=dict)
    count: float = 0.0
    sum: float = 0.0

    def since(self, earlier: Histogram) -> Histogram:
        """What was added after `earlier`; everything if the engine restarted in between."""
        if self.count < earlier.count:
            return self
        return Histogram(
            {bound: count - earlier.buckets.get(bound, 0.0) for bound, count in self.buckets.items()},
            self.count - earlier.count,
            self.sum - earlier.sum,
        )

    def plus(self, other: Histogram) -> Histogram:
        """Both together."""
        bounds = self.buckets.keys() | other.buckets.keys()
        merged = {bound: self.buckets.get(bound, 0.0) + other.buckets.get(bound, 0.0) for bound in bounds}
        return Histogram(merged, self.count + other.count, self.sum + other.sum)

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count > 0 else None

    def quantile(self, q: float) -> float | None:
        """The q-quantile by linear interpolation within its bucket, as Prometheus does; None without samples."""
        if self.count <= 0:
            return None
        rank, below_bound, below_count = q * self.count, 0.0, 0.0
        for bound in sorted(self.buckets):
            count = self.buckets[bound]
            if count >= rank:
                if math.isinf(bound) or count == below_count:
                    return below_bound
                return below_bound + (bound - below_bound) * (rank - below_count) / (count - below_count)
            below_bound, below_count = bound, count
        return below_bound


def metric_names(metrics: MetricMap) -> tuple[str, ...]:
    """Every metric that any signal may be read from."""
    sources = [source for name, found in metrics if name not in ("path", "port") for source in found]
    names = {n for s in sources for n in (s.gauge, s.rate, s.info, s.histogram, *(s.ratio or ())) if n}
    return tuple(sorted(names))


def parse_page(text: str, time: float, prefixes: tuple[str, ...] = ()) -> Page:
    """A metrics page; lines that are no samples are skipped, and everything after 20,000 samples.

    With `prefixes`, only metrics whose names begin with one of them are read, all of them.
    """
    by_name: dict[str, list[Sample]] = {}
    lines = text.splitlines()
    if prefixes:
        wanted: Iterable[str] = (line for line in lines if line.startswith(prefixes))
    else:
        wanted = lines
    for sample in _parse_lines(wanted, None if prefixes else MAX_SAMPLES):
        by_name.setdefault(sample.name, []).append(sample)
    return Page(time, {name: tuple(samples) for name, samples in by_name.items()})


def replica_sample(name: str, page: Page, metrics: MetricMap, previous: Page | None = None) -> ReplicaSample:
    """The sample of one replica. `previous` is an earlier page of it, for signals that are rates."""

    def read(sources: Sequence[MetricSource]) -> float | None:
        return read_signal(sources, page, previous)

    kv = read(metrics.kv_cache_utilization)
    return ReplicaSample(
        name=name,
        sampled_at=page.time,
        waiting=read(metrics.queue_depth) or 0.0,
        running=read(metrics.running) or 0.0,
        kv_utilization=None if kv is None else min(max(kv, 0.0), 1.0),
        kv_capacity_tokens=read(metrics.kv_capacity_tokens),
        queued_kv_tokens=read(metrics.queued_kv_tokens),
    )


def read_signal(sources: Iterable[MetricSource], page: Page, previous: Page | None = None) -> float | None:
    """The value of the first source that the page has; None when it has none of them."""
    for source in sources:
        value = _read(source, page, previous)
        if value is not None:
            return value * float(source.scale or 1.0)
    return None


def read_histogram(sources: Iterable[MetricSource], page: Page) -> Histogram | None:
    """The first histogram that the page has, summed over its label sets."""
    for source in sources:
        if source.histogram is None or not page.find(f"{source.histogram}_count", source.labels):
            continue
        buckets: dict[float, float] = {}
        for sample in page.find(f"{source.histogram}_bucket", source.labels):
            bound = _number(sample.labels.get("le", ""))
            if bound is not None:
                buckets[bound] = buckets.get(bound, 0.0) + sample.value
        count = _sum(page.find(f"{source.histogram}_count", source.labels)) or 0.0
        return Histogram(buckets, count, _sum(page.find(f"{source.histogram}_sum", source.labels)) or 0.0)
    return None


def _read(source: MetricSource, page: Page, previous: Page | None) -> float | None:
    if source.gauge is not None:
        return _sum(page.find(source.gauge, source.labels))
    if source.rate is not None:
        return _rate(source, page, previous)
    if source.ratio is not None:
        above, below = (_sum(page.find(name, source.labels)) for name in source.ratio)
        return None if above is None or not below else above / below
    if source.info is not None:
        return _product(page.find(source.info, source.labels), source.multiply)
    return None


def _rate(source: MetricSource, page: Page, previous: Page | None) -> float | None:
    if source.rate is None or previous is None or page.time <= previous.time:
        return None
    now = _sum(page.find(source.rate, source.labels))
    before = _sum(previous.find(source.rate, source.labels))
    if now is None or before is None or now < before:
        return None
    return (now - before) / (page.time - previous.time)


def _product(samples: Sequence[Sample], labels: Sequence[str]) -> float | None:
    values = [_number(samples[0].labels.get(label, "")) for label in labels] if samples else []
    if not values or any(value is None for value in values):
        return None
    return math.prod(value for value in values if value is not None)


def _sum(samples: Sequence[Sample]) -> float | None:
    values = [s.value for s in samples if not math.isnan(s.value)]
    return sum(values) if values else None


def _parse_lines(lines: Iterable[str], most: int | None) -> Iterable[Sample]:
    count = 0
    for line in lines:
        if not line or line[0] == "#":
            continue
        match = _SAMPLE.match(line)
        value = _number(match[3]) if match else None
        if match is None or value is None:
            continue
        labels = {k: _ESCAPE.sub(_unescape, v) for k, v in _LABEL.findall(match[2] or "")}
        yield Sample(match[1], labels, value)
        count += 1
        if count == most:
            return


def _unescape(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
