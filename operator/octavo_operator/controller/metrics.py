"""Prometheus metrics of the operator, read from its state when scraped."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo_operator.adapters import AdapterState
from octavo_operator.controller.engine_room import EngineRoom
from octavo_operator.controller.kinds import INFERENCE_SERVICE
from octavo_operator.controller.store import key_of


class OperatorCollector(Collector):
    """`room` is None while another operator leads."""

    def __init__(self, room: EngineRoom | None) -> None:
        self._room = room

    def collect(self) -> Iterator[Metric]:
        room = self._room
        yield GaugeMetricFamily("octavo_operator_leader", "1 while this operator leads.", value=float(room is not None))
        if room is None:
            return
        yield GaugeMetricFamily(
            "octavo_operator_watch_silence_seconds",
            "Seconds since the most silent watch heard.",
            value=room.silence_s(),
        )
        yield CounterMetricFamily("octavo_operator_api_calls", "Calls to the API server.", value=room.client.calls)
        yield CounterMetricFamily("octavo_operator_api_writes", "Writes to the API server.", value=room.client.writes)
        queue = room.services
        yield CounterMetricFamily("octavo_operator_reconciles", "Looks at InferenceServices.", value=queue.handled)
        yield CounterMetricFamily("octavo_operator_reconcile_failures", "Looks that failed.", value=queue.failed)
        yield GaugeMetricFamily("octavo_operator_queue_length", "InferenceServices to look at.", value=queue.length)
        yield GaugeMetricFamily(
            "octavo_operator_scaling_round_seconds",
            "Duration of the last scaling round.",
            value=room.scaling.last_round_s,
        )
        yield from self._services(room)
        yield from self._troubles(room)

    def _troubles(self, room: EngineRoom) -> Iterator[Metric]:
        """What is not as it should be, and what is on trial; services that are well have no samples here."""
        labels = ["namespace", "inferenceservice"]
        degraded = GaugeMetricFamily("octavo_service_degraded", "1 while degraded.", labels=[*labels, "reason"])
        failed = GaugeMetricFamily("octavo_adapters_failed", "LoRA adapters that engines refuse.", labels=labels)
        trial = GaugeMetricFamily("octavo_canary", "1 while a revision is on trial.", labels=[*labels, "phase"])
        for service in room.store.all(INFERENCE_SERVICE):
            for condition in (service.get("status") or {}).get("conditions") or []:
                if condition["type"] == "Degraded" and condition["status"] == "True":
                    degraded.add_metric([*key_of(service), condition["reason"]], 1)
        for key, state in list(room.reconciler.states.items()):
            if state.adapters:
                failed.add_metric(key, sum(view.state is AdapterState.FAILED for view in state.adapters))
            if state.trial is not None:
                trial.add_metric([*key, state.trial.phase.value], 1)
        yield from (degraded, failed, trial)

    def _services(self, room: EngineRoom) -> Iterator[Metric]:
        labels = ["namespace", "inferenceservice"]
        desired = GaugeMetricFamily("octavo_desired_replicas", "Replicas that the law asks for.", labels=labels)
        ready = GaugeMetricFamily("octavo_ready_replicas", "Replicas that answer requests.", labels=labels)
        held = GaugeMetricFamily("octavo_held_requests", "Requests held in gateways.", labels=labels)
        kv = GaugeMetricFamily("octavo_mean_kv_cache_utilization", "Mean over fresh ready replicas.", labels=labels)
        frozen = GaugeMetricFamily("octavo_scaling_frozen", "1 while too few metrics are fresh.", labels=labels)
        for key, state in list(room.reconciler.states.items()):
            decision = state.decision
            if decision is None:
                continue
            desired.add_metric(key, decision.replicas)
            ready.add_metric(key, decision.ready)
            held.add_metric(key, decision.held)
            frozen.add_metric(key, float(decision.frozen))
            if decision.kv_utilization is not None:
                kv.add_metric(key, decision.kv_utilization)
        yield from (desired, ready, held, kv, frozen)
