"""From the metrics pages of a service's replicas to the `Signals` of `decide`. No IO: pages and times are given."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median

from octavo_operator.api.serving_runtime import MetricMap
from octavo_operator.autoscale.metrics import (
    Histogram,
    Page,
    metric_names,
    parse_page,
    read_histogram,
    read_signal,
    replica_sample,
)
from octavo_operator.autoscale.signals import ReplicaSample, Signals, Ttft

TTFT_WINDOW_S = 120.0
PEAK_WINDOW_S = 60.0
SERVICE_WINDOW_S = 300.0
SERVICE_STEP_S = 30.0


@dataclass
class _Replica:
    """What is remembered of one replica: its newest page, and older histograms that windows begin at."""

    page: Page | None = None
    sample: ReplicaSample | None = None
    tokens_per_s: float = 0.0
    ttft_at_window_start: Histogram = field(default_factory=Histogram)
    work_marks: deque[tuple[float, _Work]] = field(default_factory=deque)
    tokens: deque[tuple[float, float]] = field(default_factory=deque)  # generated until a time, within one window


@dataclass(frozen=True)
class Capacity:
    """What replicas were measured to carry; None and 0 where their engine does not tell."""

    kv_tokens: int | None = None  # of one replica's cache, the median of all
    max_model_len: int | None = None
    peak_tokens_per_minute: int = 0  # most that one replica generated within a minute


@dataclass(frozen=True)
class _Work:
    """Histograms of the time of requests, and of the waiting that is part of it."""

    requests: Histogram = field(default_factory=Histogram)
    queueing: Histogram = field(default_factory=Histogram)

    def since(self, earlier: _Work) -> _Work:
        return _Work(self.requests.since(earlier.requests), self.queueing.since(earlier.queueing))

    def plus(self, other: _Work) -> _Work:
        return _Work(self.requests.plus(other.requests), self.queueing.plus(other.queueing))


class Observer:
    """Collects pages of one service. Replicas are known by any stable name, such as a pod's name or an address."""

    def __init__(self, metrics: MetricMap, started_at: float, revision: str = "") -> None:
        """`revision` names the pods that are observed, for whoever keeps observers."""
        self.revision = revision
        self._metrics = metrics
        self._names = metric_names(metrics)  # the rest of a page is not kept: there may be hundreds of replicas
        self._replicas: dict[str, _Replica] = {}
        self._window_start = started_at
        self._ttft: Ttft | None = None
        self._max_model_len: int | None = None
        self._peak_tokens = 0.0

    def add_page(self, name: str, text: str, now: float) -> ReplicaSample:
        """Take up a replica's metrics page; returns its sample."""
        replica = self._replicas.setdefault(name, _Replica())
        page = parse_page(text, now, self._names)
        first = replica.page is None
        replica.sample = replica_sample(name, page, self._metrics, replica.page)
        replica.tokens_per_s = read_signal(self._metrics.generated_tokens, page, replica.page) or 0.0
        if first:
            replica.ttft_at_window_start = self._read_ttft(page)
        self._mark_work(replica, page, now)
        if replica.page is not None:
            self._mark_tokens(replica, now - replica.page.time, now)
        longest = read_signal(self._metrics.max_model_len, page)
        self._max_model_len = int(longest) if longest else self._max_model_len
        replica.page = page
        return replica.sample

    def sample(self, name: str) -> ReplicaSample | None:
        """The newest sample of a replica."""
        replica = self._replicas.get(name)
        return replica.sample if replica else None

    def tokens_per_s(self, name: str) -> float:
        """Tokens a replica generated per second between its last two pages."""
        replica = self._replicas.get(name)
        return replica.tokens_per_s if replica else 0.0

    def capacity(self) -> Capacity:
        """What the replicas were measured to carry."""
        sizes = [r.sample.kv_capacity_tokens for r in self._replicas.values() if r.sample is not None]
        known = [size for size in sizes if size is not None]
        return Capacity(int(median(known)) if known else None, self._max_model_len, round(self._peak_tokens))

    def signals(
        self,
        *,
        current: int,
        ready: Collection[str],
        pending: int,
        now: float,
        held: int = 0,
        arrivals: float | None = None,
        unschedulable: int = 0,
        changing: bool = False,
        cold_start_s: float | None = None,
    ) -> Signals:
        """What is seen of the service now; `ready` names the replicas that take requests, others are forgotten."""
        for gone in self._replicas.keys() - set(ready):
            del self._replicas[gone]
        self._close_ttft_window(now)
        return Signals(
            current=current,
            ready=len(ready),
            samples=tuple(r.sample for r in self._replicas.values() if r.sample is not None),
            pending=pending,
            unschedulable=unschedulable,
            held=held,
            arrivals=arrivals,
            service_s=self._service_s(),
            ttft=self._ttft,
            cold_start_s=cold_start_s,
            changing=changing,
        )

    def _read_ttft(self, page: Page) -> Histogram:
        return read_histogram(self._metrics.ttft_seconds, page) or Histogram()

    def _close_ttft_window(self, now: float) -> None:
        """Every window's 95th percentile over all replicas; the guard compares whole windows."""
        if now - self._window_start < TTFT_WINDOW_S:
            return
        merged = Histogram()
        for replica in self._replicas.values():
            if replica.page is not None:
                latest = self._read_ttft(replica.page)
                merged = merged.plus(latest.since(replica.ttft_at_window_start))
                replica.ttft_at_window_start = latest
        p95 = merged.quantile(0.95)
        self._ttft = None if p95 is None else Ttft(now, p95, int(merged.count))
        self._window_start = now

    def _read_work(self, page: Page) -> _Work | None:
        requests = read_histogram(self._metrics.request_seconds, page)
        if requests is None:
            return None
        return _Work(requests, read_histogram(self._metrics.queue_seconds, page) or Histogram())

    def _mark_work(self, replica: _Replica, page: Page, now: float) -> None:
        work = self._read_work(page)
        marks = replica.work_marks
        if work is None or (marks and now - marks[-1][0] < SERVICE_STEP_S):
            return
        marks.append((now, work))
        while len(marks) > 2 and now - marks[1][0] >= SERVICE_WINDOW_S:
            marks.popleft()

    def _mark_tokens(self, replica: _Replica, elapsed_s: float, now: float) -> None:
        replica.tokens.append((now, replica.tokens_per_s * elapsed_s))
        while replica.tokens and now - replica.tokens[0][0] >= PEAK_WINDOW_S:
            replica.tokens.popleft()
        self._peak_tokens = max(self._peak_tokens, sum(tokens for _, tokens in replica.tokens))

    def _service_s(self) -> float | None:
        """Mean seconds a request ran over the last minutes, its waiting not counted."""
        merged = _Work()
        for replica in self._replicas.values():
            latest = self._read_work(replica.page) if replica.page is not None else None
            if latest is not None and replica.work_marks:
                merged = merged.plus(latest.since(replica.work_marks[0][1]))
        mean = merged.requests.mean
        return None if mean is None else max(mean - (merged.queueing.mean or 0.0), 0.0)
