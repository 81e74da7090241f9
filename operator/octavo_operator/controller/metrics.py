"""Prometheus metrics of the operator, read from its state when scraped."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from octavo_operator.controller.engine_room import EngineRoom


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
        yield CounterMetricFamily("octavo_operator_api_writes", "Writes to the API server.", value=room.client.writes)
        yield GaugeMetricFamily(
            "octavo_operator_scaling_round_seconds",
            "Duration of the last scaling round.",
            value=room.scaling.last_round_s,
        )
        yield from self._services(room)

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
