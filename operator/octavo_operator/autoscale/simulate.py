"""Judge scaling laws on arrival traces with a model of continuous batching. Pure: virtual time, no chance of its own.

The model: a replica admits requests while their prompts fit its KV cache, prefills at a fixed rate in order of arrival,
and decodes all running requests at a shared rate. Requests wait in the gateway until a replica is not saturated (late
binding). It has no prefix reuse, no network and no failures: it ranks laws, it does not predict a deployment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

from octavo_operator.autoscale.signals import ReplicaSample, Signals
from octavo_operator.autoscale.workload import Arrival

TICK_S = 0.5
INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class Hardware:
    """One replica and the cluster around it. Tokens, tokens per second, seconds."""

    kv_tokens: int = 60_000
    prefill_rate: float = 12_000.0
    decode_rate: float = 2_400.0  # of all running requests together
    decode_rate_single: float = 70.0
    max_num_seqs: int = 128
    cold_start_s: float = 150.0
    min_replicas: int = 1
    max_replicas: int = 20
    saturated_waiting: int = 4
    saturated_kv: float = 0.90


@dataclass(frozen=True, slots=True)
class Report:
    """What a law cost and what it missed. `slo_met` is the share of requests with a first token within the limit."""

    law: str
    requests: int
    slo_met: float
    wait_p95_s: float
    replica_hours: float
    reversals: int
    peak_replicas: int
    timeline: tuple[tuple[float, int, int], ...] = ()  # (time, wanted, waiting)

    @property
    def slo_misses(self) -> int:
        return self.requests - round(self.slo_met * self.requests)


class Law(Protocol):
    """Decides how many replicas there shall be, every interval."""

    name: str

    def decide(self, signals: Signals, now: float) -> int: ...


@dataclass(slots=True)
class _Request:
    arrival: Arrival
    prefill_left: float
    output_left: float
    kv: float = 0.0


@dataclass(slots=True)
class _Replica:
    name: str
    created_at: float
    ready_at: float
    waiting: deque[_Request] = field(default_factory=deque)
    running: list[_Request] = field(default_factory=list)
    draining: bool = False

    def kv(self, hardware: Hardware) -> float:
        return min(1.0, sum(r.kv for r in self.running) / hardware.kv_tokens)

    def saturated(self, hardware: Hardware) -> bool:
        return len(self.waiting) >= hardware.saturated_waiting or self.kv(hardware) >= hardware.saturated_kv


class Simulation:
    """One law on one trace."""

    def __init__(self, law: Law, arrivals: Sequence[Arrival], hardware: Hardware, slo_ttft_s: float) -> None:
        self._law = law
        self._arrivals = arrivals
        self._hardware = hardware
        self._slo = slo_ttft_s
        self._now = 0.0
        self._held: deque[_Request] = deque()
        self._arrived = 0
        self._replicas: list[_Replica] = []
        self._made = 0
        self._ttft: list[float] = []
        self._service: deque[tuple[float, float]] = deque(maxlen=400)
        self._replica_seconds = 0.0
        self._timeline: list[tuple[float, int, int]] = []
        self._wanted = hardware.min_replicas
        for _ in range(hardware.min_replicas):
            self._add(ready=True)

    def run(self, grace_s: float = 900.0) -> Report:
        """Play the whole trace, then up to `grace_s` until the last request has its first token."""
        end = self._arrivals[-1].time if self._arrivals else 0.0
        next_decision = 0.0
        while self._now < end or (len(self._ttft) < len(self._arrivals) and self._now < end + grace_s):
            self._arrive()
            if self._now >= next_decision:
                self._scale()
                next_decision += INTERVAL_S
            self._bind()
            for replica in self._replicas:
                if replica.ready_at <= self._now:
                    self._serve(replica)
            self._replicas = [r for r in self._replicas if not (r.draining and not r.running and not r.waiting)]
            self._replica_seconds += len(self._replicas) * TICK_S
            self._now += TICK_S
        return self._report()

    def _arrive(self) -> None:
        while self._arrived < len(self._arrivals) and self._arrivals[self._arrived].time <= self._now:
            arrival = self._arrivals[self._arrived]
            self._held.append(_Request(arrival, arrival.input_tokens, arrival.output_tokens))
            self._arrived += 1

    def _bind(self) -> None:
        ready = [r for r in self._replicas if r.ready_at <= self._now and not r.draining]
        while self._held and ready:
            best = min(ready, key=lambda r: (len(r.waiting), len(r.running)))
            if best.saturated(self._hardware):
                ready.remove(best)
                continue
            best.waiting.append(self._held.popleft())

    def _serve(self, replica: _Replica) -> None:
        hardware = self._hardware
        used = sum(r.kv for r in replica.running)
        while replica.waiting and len(replica.running) < hardware.max_num_seqs:
            need = replica.waiting[0].arrival.input_tokens
            if used + need > hardware.kv_tokens and replica.running:
                break
            request = replica.waiting.popleft()
            request.kv = need
            used += need
            replica.running.append(request)
        budget = hardware.prefill_rate * TICK_S
        for request in replica.running:
            if request.prefill_left <= 0 or budget <= 0:
                continue
            done = min(budget, request.prefill_left)
            request.prefill_left -= done
            budget -= done
            if request.prefill_left <= 0:
                self._ttft.append(self._now - request.arrival.time)
        decoding = [r for r in replica.running if r.prefill_left <= 0]
        if decoding:
            rate = min(hardware.decode_rate_single, hardware.decode_rate / len(decoding)) * TICK_S
            for request in decoding:
                request.output_left -= rate
                request.kv += rate
        finished = [r for r in replica.running if r.output_left <= 0]
        if finished:
            mean_s = sum(r.arrival.output_tokens for r in finished) / len(finished) / max(rate / TICK_S, 1e-9)
            self._service.append((self._now, mean_s))
            replica.running = [r for r in replica.running if r.output_left > 0]

    def signals(self) -> Signals:
        """What a law sees now."""
        live = [r for r in self._replicas if not r.draining]
        ready = [r for r in live if r.ready_at <= self._now]
        recent = [s for t, s in self._service if self._now - t <= 300]
        samples = tuple(
            ReplicaSample(
                r.name,
                self._now,
                waiting=len(r.waiting),
                running=len(r.running),
                kv_utilization=r.kv(self._hardware),
                kv_capacity_tokens=self._hardware.kv_tokens,
                queued_kv_tokens=sum(q.arrival.input_tokens for q in r.waiting),
            )
            for r in ready
        )
        return Signals(
            current=self._wanted,
            ready=len(ready),
            samples=samples,
            pending=len(live) - len(ready),
            held=len(self._held),
            arrivals=float(self._arrived),
            service_s=sum(recent) / len(recent) if recent else None,
            cold_start_s=self._hardware.cold_start_s,
        )

    def _scale(self) -> None:
        wanted = self._law.decide(self.signals(), self._now)
        wanted = min(max(wanted, self._hardware.min_replicas), self._hardware.max_replicas)
        live = [r for r in self._replicas if not r.draining]
        for _ in range(wanted - len(live)):
            self._add(ready=False)
        if wanted < len(live):
            by_work = sorted(live, key=lambda r: (r.ready_at <= self._now, len(r.running) + len(r.waiting)))
            for replica in by_work[: len(live) - wanted]:
                replica.draining = True
                self._held.extendleft(reversed(replica.waiting))
                replica.waiting.clear()
        self._wanted = wanted
        queued = len(self._held) + sum(len(r.waiting) for r in self._replicas)
        self._timeline.append((self._now, wanted, queued))

    def _add(self, *, ready: bool) -> None:
        self._made += 1
        start = self._now if ready else self._now + self._hardware.cold_start_s
        self._replicas.append(_Replica(f"r{self._made}", self._now, start))

    def _report(self) -> Report:
        total = len(self._arrivals)
        waits = sorted(self._ttft) + [float("inf")] * (total - len(self._ttft))
        numbers = [wanted for _, wanted, _ in self._timeline]
        moves = [b - a for a, b in pairwise(numbers) if b != a]
        return Report(
            law=self._law.name,
            requests=total,
            slo_met=sum(w <= self._slo for w in waits) / total if total else 1.0,
            wait_p95_s=waits[min(total - 1, int(0.95 * total))] if total else 0.0,
            replica_hours=self._replica_seconds / 3600,
            reversals=sum(a * b < 0 for a, b in pairwise(moves)),
            peak_replicas=max(numbers, default=0),
            timeline=tuple(self._timeline),
        )


def simulate(law: Law, arrivals: Sequence[Arrival], hardware: Hardware, slo_ttft_s: float = 2.0) -> Report:
    """Play a trace against a law."""
    return Simulation(law, arrivals, hardware, slo_ttft_s).run()
