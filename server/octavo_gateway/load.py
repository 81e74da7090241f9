"""How busy each replica is: the gateway's own exact in-flight count joined with the replica's last report."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_gateway.registry import Saturation

COLD_CONCURRENCY = 8
"""Requests a replica may receive before its first report arrives, and the least it may gain between two reports."""

PREFILL_TOKENS = 250.0
"""Prompt tokens still to be computed that weigh as much as one request being decoded."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """One reading of a replica's metrics.

    `capacity` is its max_num_seqs where the runtime tells it, `generated_tokens` its count since it started,
    `kv_cache_tokens` how many tokens its cache holds.
    """

    waiting: float
    running: float
    kv_cache_utilization: float
    at: float
    capacity: float | None = None
    generated_tokens: float | None = None
    kv_cache_tokens: float | None = None


class EndpointLoad:
    """Load of one replica. Times are seconds of the caller's monotonic clock."""

    __slots__ = (
        "_in_flight_at_report",
        "expects_reports",
        "in_flight",
        "last_chosen",
        "pending_tokens",
        "report",
        "tokens_per_second",
    )

    def __init__(self) -> None:
        self.in_flight = 0
        self.last_chosen = 0
        self.pending_tokens = 0.0  # prompt tokens to compute of streams that have not begun to answer
        self.report: LoadReport | None = None
        self.expects_reports = True
        self.tokens_per_second = 0.0
        self._in_flight_at_report = 0

    def update(self, report: LoadReport, in_flight_when_asked: int | None = None) -> None:
        """Take a new reading. Requests sent after it was asked for may be missing in it, so they are added to it."""
        self.tokens_per_second = _token_rate(self.report, report)
        self.report = report
        self.expects_reports = True
        self._in_flight_at_report = self.in_flight if in_flight_when_asked is None else in_flight_when_asked

    def restarted(self, report: LoadReport) -> bool:
        """True when this reading's counter began anew: another process answers there, with an empty cache."""
        before = self.report.generated_tokens if self.report is not None else None
        return before is not None and report.generated_tokens is not None and report.generated_tokens < before

    def forget_report(self, expects_reports: bool) -> None:
        """Drop a stale reading; `expects_reports` is False for a runtime that has no metrics page."""
        self.report = None
        self.tokens_per_second = 0.0
        self.expects_reports = expects_reports

    @property
    def kv_cache_utilization(self) -> float:
        return self.report.kv_cache_utilization if self.report else 0.0

    @property
    def outstanding(self) -> float:
        """Requests in the replica now: reported ones corrected by what this gateway sent or finished since."""
        if self.report is None:
            return float(self.in_flight)
        reported = self.report.waiting + self.report.running + self.in_flight - self._in_flight_at_report
        return max(float(self.in_flight), reported)

    @property
    def waiting(self) -> float:
        """Estimate of requests queued inside the replica now."""
        if self.report is None:
            return max(0.0, float(self.in_flight - COLD_CONCURRENCY)) if self.expects_reports else 0.0
        sent_since = self.in_flight - self._in_flight_at_report
        own = 0.0 if self.report.capacity is None else self.in_flight - self.report.capacity
        if self.report.waiting > 0:
            return max(0.0, own, self.report.waiting + sent_since)
        if self.report.capacity is not None:
            free = max(0.0, self.report.capacity - self.report.running)
        else:
            free = max(float(COLD_CONCURRENCY), self.report.running)
        return max(0.0, own, sent_since - free)

    def score(self, weight: float = 1.0) -> float:
        """Comparable load: work present, queued work counted twice, weighed up by how full the KV cache is; and the
        prompts this gateway knows to be uncomputed, which is what a new request's first token waits for."""
        prefill = self.pending_tokens / PREFILL_TOKENS
        return ((self.outstanding + self.waiting) * (1.0 + self.kv_cache_utilization) + prefill) / weight

    def saturated(self, line: Saturation) -> bool:
        """True when new requests should wait in the gateway rather than here.

        A replica with nothing in flight is never saturated by KV use alone: nothing would ever free it.
        """
        if self.waiting >= line.queue_depth:
            return True
        return self.outstanding > 0 and self.kv_cache_utilization >= line.kv_cache_utilization


def _token_rate(before: LoadReport | None, now: LoadReport) -> float:
    """Tokens generated per second between two readings; 0 across a restart of the replica."""
    if before is None or before.generated_tokens is None or now.generated_tokens is None or now.at <= before.at:
        return 0.0
    return max(0.0, now.generated_tokens - before.generated_tokens) / (now.at - before.at)


class LoadBook:
    """Loads of all endpoints by id. Entries of endpoints that are gone live until their last request ends."""

    def __init__(self) -> None:
        self._loads: dict[str, EndpointLoad] = {}
        self._clock = 0

    def __getitem__(self, endpoint_id: str) -> EndpointLoad:
        load = self._loads.get(endpoint_id)
        if load is None:
            load = self._loads[endpoint_id] = EndpointLoad()
        return load

    def __len__(self) -> int:
        return len(self._loads)

    def begin(self, endpoint_id: str, pending_tokens: float = 0.0) -> None:
        """Count one request sent to this endpoint, and the prompt tokens it must compute before it answers."""
        load = self[endpoint_id]
        load.in_flight += 1
        load.pending_tokens += pending_tokens
        self._clock += 1
        load.last_chosen = self._clock

    def answered(self, endpoint_id: str, pending_tokens: float) -> None:
        """The prompt of a request was computed (or the request is over)."""
        load = self[endpoint_id]
        load.pending_tokens = max(0.0, load.pending_tokens - pending_tokens)

    def end(self, endpoint_id: str) -> None:
        """Count one request finished or given up."""
        load = self[endpoint_id]
        if load.in_flight <= 0:
            raise RuntimeError(f"endpoint {endpoint_id}: a request ended that never began")
        load.in_flight -= 1

    def retain(self, endpoint_ids: set[str]) -> None:
        """Forget endpoints that are neither in the set nor busy."""
        for gone in [i for i, load in self._loads.items() if i not in endpoint_ids and load.in_flight == 0]:
            del self._loads[gone]
