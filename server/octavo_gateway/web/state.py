"""What the page shows, as one small JSON document: models, replicas, queues, cache use, scaling."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from octavo_gateway.load import EndpointLoad, LoadBook
from octavo_gateway.registry import Endpoint, ModelEntry
from octavo_gateway.signals import GatewaySignals


def state_document(
    entries: Iterable[ModelEntry],
    loads: LoadBook,
    signals: Callable[[str], GatewaySignals],
    *,
    draining: bool,
    usage: bool,
    version: str,
) -> bytes:
    """The state of these models now. `usage`: the gateway keeps a ledger that can be asked."""
    models = [_model(entry, loads, signals(entry.name)) for entry in entries]
    return json.dumps({"version": version, "draining": draining, "usage": usage, "models": models}).encode()


def _model(entry: ModelEntry, loads: LoadBook, signals: GatewaySignals) -> dict[str, object]:
    return {
        "name": entry.name,
        "namespace": entry.namespace,
        "aliases": list(entry.aliases),
        "adapters": list(entry.adapters),
        "strategy": entry.strategy.value,
        "scale_to_zero": entry.scale_to_zero,
        "desired_replicas": entry.desired_replicas,
        "scaling_reason": entry.scaling_reason,
        "held": signals.held,
        "in_flight": signals.in_flight,
        "arrival_rate": round(signals.arrival_rate, 3),
        "completion_rate": round(signals.completion_rate, 3),
        "mean_service_s": round(signals.mean_service_s, 3),
        "replicas": [_replica(endpoint, loads[endpoint.id]) for endpoint in entry.endpoints],
    }


def _replica(endpoint: Endpoint, load: EndpointLoad) -> dict[str, object]:
    return {
        "id": endpoint.id,
        "state": endpoint.state.value,
        "waiting": round(load.waiting, 1),
        "running": round(max(0.0, load.outstanding - load.waiting), 1),
        "kv_cache_utilization": round(load.kv_cache_utilization, 4),
        "tokens_per_second": round(load.tokens_per_second, 1),
    }
