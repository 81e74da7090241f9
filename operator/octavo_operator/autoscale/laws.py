"""Scaling laws for the simulator: ours, and models of those of other systems as their code or papers state them.

Peers differ in the signal and in the formula; all of them keep the largest result of 300 s before going down, as HPA
does, so that what is compared is the law and not its patience.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo_operator.autoscale.decide import Decision, decide
from octavo_operator.autoscale.history import History
from octavo_operator.autoscale.policy import ScalingPolicy
from octavo_operator.autoscale.signals import ReplicaSample, Signals
from octavo_operator.autoscale.simulate import Hardware, Law

DOWN_WINDOW_S = 300.0


class OctavoLaw:
    """Our own law, with the history it keeps. `decisions` holds every answer with its inputs."""

    def __init__(self, policy: ScalingPolicy, name: str = "octavo") -> None:
        self.name = name
        self.decisions: list[Decision] = []
        self._policy = policy
        self._history = History(started_at=-DOWN_WINDOW_S)

    def decide(self, signals: Signals, now: float) -> int:
        decision = decide(signals, self._policy, self._history, now)
        self._history = decision.history
        self.decisions.append(decision)
        return decision.replicas


@dataclass
class _Patient:
    """Largest result of the last 300 s."""

    seen: deque[tuple[float, int]] = field(default_factory=deque)

    def __call__(self, wanted: int, current: int, now: float) -> int:
        self.seen.append((now, wanted))
        while self.seen and now - self.seen[0][0] > DOWN_WINDOW_S:
            self.seen.popleft()
        return wanted if wanted >= current else min(current, max(n for _, n in self.seen))


class FormulaLaw:
    """A law that is a formula of what is seen now."""

    def __init__(self, name: str, formula: Callable[[Signals], float]) -> None:
        self.name = name
        self._formula = formula
        self._patient = _Patient()

    def decide(self, signals: Signals, now: float) -> int:
        return self._patient(math.ceil(self._formula(signals) - 1e-9), signals.current, now)


def keda_queue(threshold: float = 5.0) -> Law:
    """KEDA with AverageValue on waiting requests: total / threshold."""
    return FormulaLaw(f"KEDA waiting>{threshold:g}", lambda s: _waiting(s) / threshold)


def hpa_kv(target: float = 0.8, tolerance: float = 0.1) -> Law:
    """HPA on mean KV utilization: n * current / target, unless within the tolerance; absent pods count as idle."""

    def formula(signals: Signals) -> float:
        if not signals.samples:
            return signals.current
        use = sum(s.kv_utilization or 0.0 for s in signals.samples)
        ratio = use / max(signals.ready, 1) / target
        if abs(ratio - 1) <= tolerance:
            return signals.current
        return max(use / target, 1) if ratio > 1 else signals.ready * ratio

    return FormulaLaw(f"HPA KV {target:g}", formula)


def keda_both(threshold: float = 5.0, target: float = 0.8) -> Law:
    """KEDA with two triggers: the larger of queue and KV."""
    queue, kv = keda_queue(threshold), hpa_kv(target)
    return _Largest("KEDA max(waiting, KV)", (queue, kv))


class _Largest:
    def __init__(self, name: str, laws: tuple[Law, ...]) -> None:
        self.name = name
        self._laws = laws

    def decide(self, signals: Signals, now: float) -> int:
        return max(law.decide(signals, now) for law in self._laws)


class KnativeLaw:
    """Knative's pod autoscaler on concurrency: a stable window of 60 s and a panic window of 6 s at twice the load."""

    def __init__(self, target: float = 32.0) -> None:
        self.name = f"Knative KPA {target:g}"
        self._target = target
        self._seen: deque[tuple[float, float]] = deque()
        self._panic_until = -1.0
        self._panic_peak = 0
        self._patient = _Patient()

    def decide(self, signals: Signals, now: float) -> int:
        self._seen.append((now, _active(signals)))
        while now - self._seen[0][0] > 60:
            self._seen.popleft()
        stable = _mean([v for _, v in self._seen])
        panic = _mean([v for t, v in self._seen if now - t <= 6])
        ready = max(signals.ready, 1)
        wanted = math.ceil(min(stable / self._target, ready * 1_000))
        urgent = math.ceil(panic / self._target)
        if urgent >= 2 * ready:
            self._panic_until = now + 60
        if now <= self._panic_until:
            self._panic_peak = max(self._panic_peak, urgent, wanted)
            return self._panic_peak
        self._panic_peak = 0
        return self._patient(wanted, signals.current, now)


class KubeAILaw:
    """KubeAI: mean of active requests over 10 minutes (windows begin at zero) by a target per replica."""

    def __init__(self, target: float = 32.0) -> None:
        self.name = f"KubeAI {target:g}"
        self._target = target
        self._samples: deque[float] = deque([0.0] * 60, maxlen=60)
        self._last = -10.0
        self._patient = _Patient()

    def decide(self, signals: Signals, now: float) -> int:
        if now - self._last < 10:
            return signals.current
        self._last = now
        self._samples.append(_active(signals))
        return self._patient(math.ceil(_mean(list(self._samples)) / self._target), signals.current, now)


class AIBrixLaw:
    """AIBrix APA on mean KV utilization: nothing within 10 % of the target, else the ratio, at most twice or half."""

    def __init__(self, target: float = 0.5) -> None:
        self.name = f"AIBrix APA KV {target:g}"
        self._target = target
        self._patient = _Patient()

    def decide(self, signals: Signals, now: float) -> int:
        ready = max(signals.ready, 1)
        ratio = _mean([s.kv_utilization or 0.0 for s in signals.samples]) / self._target
        if ratio > 1.1:
            wanted = min(math.ceil(ready * ratio), 2 * ready)
        elif ratio < 0.9:
            wanted = max(math.ceil(ready * ratio), ready // 2)
        else:
            wanted = ready
        return self._patient(max(wanted, 1), signals.current, now)


class VariantAutoscalerLaw:
    """llm-d's workload-variant-autoscaler, version 1: one more or less by the spare capacity of calm replicas."""

    def __init__(self, kv: float = 0.80, queue: float = 5.0, spare_kv: float = 0.1, spare_queue: float = 3.0) -> None:
        self.name = "WVA v1"
        self._limits = (kv, queue)
        self._spare = (spare_kv, spare_queue)
        self._patient = _Patient()

    def decide(self, signals: Signals, now: float) -> int:
        kv, queue = self._limits
        calm = [s for s in signals.samples if (s.kv_utilization or 0.0) < kv and s.waiting < queue]
        if signals.pending:
            return signals.current
        if not calm or self._is_tight(calm, 1.0):
            return self._patient(signals.ready + 1, signals.current, now)
        shrunk = (len(calm)) / (len(calm) - 1) if len(calm) > 1 else math.inf
        fewer = signals.ready - 1 if shrunk < math.inf and not self._is_tight(calm, shrunk) else signals.ready
        return self._patient(fewer, signals.current, now)

    def _is_tight(self, calm: Sequence[ReplicaSample], factor: float) -> bool:
        kv, queue = self._limits
        uses = [s.kv_utilization or 0.0 for s in calm]
        waits = [s.waiting for s in calm]
        return kv - _mean(uses) * factor < self._spare[0] or queue - _mean(waits) * factor < self._spare[1]


class TokenCapacityLaw:
    """WVA, version 2: token demand against token capacity, with the mean lengths of requests known to it.

    A replica's capacity is 80 % of its cache, or what was in use when 5 or more waited there; demand counts what waits
    in replicas by its prompt and what waits before them by its whole length.
    """

    def __init__(self, up: float = 0.85, down: float = 0.70, mean_input: float = 900.0, mean_output: float = 280.0):
        self.name = "WVA v2" if up == 0.85 else f"WVA v2 {up:g}"
        self._up, self._down = up, down
        self._mean_input, self._mean_length = mean_input, mean_input + mean_output
        self._saturated: dict[str, deque[float]] = {}
        self._patient = _Patient()

    def decide(self, signals: Signals, now: float) -> int:
        capacities, demand = [], signals.held * self._mean_length
        for sample in signals.samples:
            cache = sample.kv_capacity_tokens or 0.0
            used = (sample.kv_utilization or 0.0) * cache
            seen = self._saturated.setdefault(sample.name, deque(maxlen=10))
            if sample.waiting >= 5:
                seen.append(used)
            capacities.append(min(0.8 * cache, _mean(list(seen))) if seen else 0.8 * cache)
            demand += used + sample.waiting * self._mean_input
        if not capacities:
            return signals.current
        capacity = sorted(capacities)[len(capacities) // 2]
        there = signals.ready + signals.pending
        more = math.ceil(max(0.0, demand / self._up - capacity * there) / capacity)
        if more:
            return self._patient(there + more, signals.current, now)
        fewer = math.floor(max(0.0, capacity * signals.ready - demand / self._down) / capacity)
        return self._patient(max(1, there - fewer), signals.current, now)


def all_laws(hardware: Hardware) -> list[Law]:
    """Ours and every peer's, fresh."""
    policy = ScalingPolicy(
        min_replicas=hardware.min_replicas, max_replicas=hardware.max_replicas, max_num_seqs=hardware.max_num_seqs
    )
    return [
        OctavoLaw(policy),
        keda_queue(),
        hpa_kv(),
        keda_both(),
        KnativeLaw(),
        KubeAILaw(),
        AIBrixLaw(),
        VariantAutoscalerLaw(),
        TokenCapacityLaw(),
    ]


def _waiting(signals: Signals) -> float:
    return signals.held + sum(s.waiting for s in signals.samples)


def _active(signals: Signals) -> float:
    return _waiting(signals) + sum(s.running for s in signals.samples)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
