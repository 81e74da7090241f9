"""Discovery from a cluster: route ConfigMaps say how to serve, Pods say where, InferenceServices say what is wanted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from octavo_gateway.discovery.kube_api import ApiServer, Item, Watched, follow
from octavo_gateway.registry import (
    CacheEvents,
    Endpoint,
    EndpointState,
    HoldPolicy,
    ModelEntry,
    Registry,
    RetryPolicy,
    Saturation,
    Strategy,
)

log = logging.getLogger("octavo.gateway.discovery")

SETTLE_S = 0.05
"""Changes are gathered this long, so that a rollout of many pods is one new snapshot and not hundreds."""

GROUP = "serving.octavo.dev"
SERVICE_LABEL = f"{GROUP}/inferenceservice"
TRACK_LABEL = f"{GROUP}/track"
ROUTE_SELECTOR = f"{GROUP}/route=true"
POD_SELECTOR = f"{SERVICE_LABEL},app.kubernetes.io/component=engine"
ROUTE_KEY = "route.json"
ADAPTERS_ANNOTATION = f"{GROUP}/adapters"  # paths by name, as JSON
ADDRESS_ANNOTATION = f"{GROUP}/address"  # host:port of a replica that is no pod, in development and tests


def build_entries(routes: Iterable[Item], pods: Iterable[Item], services: Iterable[Item]) -> list[ModelEntry]:
    """Join what was watched. Pure; an unreadable route is told and left out, never fatal."""
    by_service: dict[tuple[str, str], list[Item]] = {}
    for pod in pods:
        meta = pod["metadata"]
        by_service.setdefault((meta["namespace"], meta.get("labels", {}).get(SERVICE_LABEL, "")), []).append(pod)
    wanted = {(s["metadata"]["namespace"], s["metadata"]["name"]): s for s in services}
    entries: list[ModelEntry] = []
    seen: set[tuple[str, str]] = set()
    for config_map in sorted(routes, key=_age):
        try:
            route = json.loads(config_map["data"][ROUTE_KEY])
            key = (config_map["metadata"]["namespace"], route["service"])
            if key not in seen:
                seen.add(key)
                entries.append(_entry(config_map, route, by_service.get(key, []), wanted.get(key, {})))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            meta = config_map["metadata"]
            log.error("kubernetes: ConfigMap %s/%s is no readable route (%s)", meta["namespace"], meta["name"], error)
    return entries


def _entry(config_map: Item, route: dict[str, Any], pods: Iterable[Item], service: Item) -> ModelEntry:
    status, spec = service.get("status") or {}, service.get("spec") or {}
    adapters = ((spec.get("model") or {}).get("adapters") or {}).get("items") or []
    hold, retry, line = route.get("hold") or {}, route.get("retry") or {}, route.get("saturation") or {}
    name, *aliases = route["models"]
    decision = (status.get("scaling") or {}).get("decision") or {}
    desired = status.get("desiredReplicas")
    return ModelEntry(
        name=name,
        endpoints=tuple(e for e in (_endpoint(pod, route) for pod in sorted(pods, key=_name)) if e),
        aliases=tuple(aliases),
        adapters=tuple(adapter["name"] for adapter in adapters),
        namespace=config_map["metadata"]["namespace"],
        created=_created(config_map),
        strategy=Strategy(route.get("strategy") or Strategy.PREFIX_AWARE),
        session_header=(route.get("sessionHeader") or "x-session-id").lower(),
        saturation=Saturation(int(line.get("queueDepth", 4)), float(line.get("kvCacheUtilization", 0.9))),
        hold=HoldPolicy(int(hold.get("maxHeldRequests", 500)), float(hold.get("timeoutSeconds", 300))),
        retry=RetryPolicy(int(retry.get("attempts", 2)), retry.get("perTryTimeoutSeconds")),
        scale_to_zero=bool(route.get("scaleToZero")),
        desired_replicas=None if desired is None else int(desired),
        canary_weight=None if route.get("canary") is None else int(route["canary"]["weight"]),
        scaling_reason=str(decision.get("message") or decision.get("reason") or ""),
    )


def _endpoint(pod: Item, route: Mapping[str, Any]) -> Endpoint | None:
    """A pod as an endpoint; None before it has an address and after it ended."""
    status, meta, port = pod.get("status") or {}, pod["metadata"], int(route["port"])
    address = str(status.get("podIP") or "")
    annotated = meta.get("annotations", {}).get(ADDRESS_ANNOTATION)
    if not (address or annotated) or status.get("phase") in ("Succeeded", "Failed"):
        return None
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions") or ())
    if meta.get("deletionTimestamp"):
        state = EndpointState.DRAINING
    else:
        state = EndpointState.READY if ready else EndpointState.STARTING
    host = f"[{address}]" if ":" in address else address
    place = annotated or f"{host}:{port}"
    told = route.get("kvEvents")
    events = None
    if told is not None and not annotated:
        events = CacheEvents(f"tcp://{host}:{int(told['port'])}", f"tcp://{host}:{int(told['replayPort'])}")
    labels = meta.get("labels", {})
    revision, canary = labels.get("pod-template-hash", ""), labels.get(TRACK_LABEL) == "canary"
    name = f"{meta['namespace']}/{meta['name']}"
    return Endpoint(
        name, f"http://{place}", state, adapters=_adapters(meta), revision=revision, canary=canary, cache_events=events
    )


def _adapters(meta: Item) -> frozenset[str]:
    """The LoRA adapters that the operator noted on a pod after loading them there."""
    try:
        noted = json.loads(meta.get("annotations", {}).get(ADAPTERS_ANNOTATION) or "{}")
    except ValueError:
        return frozenset()
    return frozenset(noted) if isinstance(noted, dict) else frozenset()


def _name(item: Item) -> str:
    return str(item["metadata"]["name"])


def _age(item: Item) -> tuple[str, str, str]:
    """Oldest first: a newer service cannot take over the model name of an older one."""
    meta = item["metadata"]
    return meta.get("creationTimestamp") or "", meta["namespace"], meta["name"]


def _created(item: Item) -> int:
    text = item["metadata"].get("creationTimestamp")
    return int(datetime.fromisoformat(text).timestamp()) if text else 0


class KubernetesDiscovery:
    """Publishes the cluster's models. Without the API server the last view keeps serving."""

    def __init__(
        self,
        server: ApiServer,
        registry: Registry,
        *,
        namespace: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        scope = f"/namespaces/{namespace}" if namespace else ""
        self._server = server
        self._registry = registry
        self._options = dict(options or {})
        self.routes = Watched(f"/api/v1{scope}/configmaps", ROUTE_SELECTOR)
        self.pods = Watched(f"/api/v1{scope}/pods", POD_SELECTOR)
        self.services = Watched(f"/apis/{GROUP}/v1alpha1{scope}/inferenceservices")
        self._published: list[ModelEntry] | None = None

    async def run(self) -> None:
        """Follow until cancelled."""
        await follow(self._server, (self.routes, self.pods, self.services), self._publish, SETTLE_S, **self._options)

    def _publish(self) -> None:
        entries = build_entries(self.routes.items.values(), self.pods.items.values(), self.services.items.values())
        if entries != self._published:
            self._published = entries
            self._registry.publish(entries)
            for conflict in self._registry.snapshot.conflicts:
                log.warning("kubernetes: %s", conflict)
