"""Discovery and tenants from a cluster: what is joined, and that no fault of the API leaves a stale view for good."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fakes.gateway_door import until
from fakes.kube_api import KubeApi
from octavo_gateway.discovery import ApiServer, KubernetesDiscovery
from octavo_gateway.discovery.kubernetes import build_entries
from octavo_gateway.errors import ConfigError
from octavo_gateway.registry import CacheEvents, Endpoint, EndpointState, Registry, Strategy
from octavo_gateway.tenancy import TenantDirectory, hash_key, new_key
from octavo_gateway.tenancy.keys import format_hash
from octavo_gateway.tenancy.kubernetes import KubernetesTenants, build_from_cluster

CONFIG_MAPS, PODS, SECRETS = "/api/v1/configmaps", "/api/v1/pods", "/api/v1/secrets"
SERVICES = "/apis/serving.octavo.dev/v1alpha1/inferenceservices"
TENANTS = "/apis/serving.octavo.dev/v1alpha1/inferencetenants"
QUICK = {"silence_s": 0.5, "backoff_s": (0.02, 0.1)}


def route(service: str, models: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    body = {"service": service, "models": models or [service], "port": 8000} | fields
    labels = {"serving.octavo.dev/route": "true"}
    created = fields.get("created", "2026-11-01T00:00:00Z")
    meta = {"name": f"{service}-route", "namespace": "default", "labels": labels, "creationTimestamp": created}
    return {"metadata": meta, "data": {"route.json": json.dumps(body)}}


def pod(name: str, service: str, *, ready: bool = True, ip: str | None = "10.0.0.1", **meta: Any) -> dict[str, Any]:
    labels = {"serving.octavo.dev/inferenceservice": service, "app.kubernetes.io/component": "engine"}
    status: dict[str, Any] = {"phase": "Running", "conditions": [{"type": "Ready", "status": str(ready)}]}
    if ip:
        status["podIP"] = ip
    return {"metadata": {"name": name, "namespace": "default", "labels": labels} | meta, "status": status}


def test_routes_pods_and_services_are_joined() -> None:
    full = route(
        "llama",
        ["llama-8b", "small"],
        strategy="LeastLoaded",
        sessionHeader="X-Chat",
        saturation={"queueDepth": 7, "kvCacheUtilization": 0.5},
        hold={"maxHeldRequests": 11, "timeoutSeconds": 12},
        retry={"attempts": 3, "perTryTimeoutSeconds": 9},
        scaleToZero=True,
    )
    service = {
        "metadata": {"name": "llama", "namespace": "default"},
        "spec": {"model": {"adapters": {"items": [{"name": "sql", "storageUri": "s3://x"}]}}},
        "status": {"desiredReplicas": 2, "scaling": {"decision": {"message": "kv 0.8 of 0.75"}}},
    }
    pods = [
        pod("b-ready", "llama", ip="fd00::1"),
        pod("a-starting", "llama", ready=False),
        pod("c-leaving", "llama", deletionTimestamp="2026-11-21T00:00:00Z"),
        pod("d-unborn", "llama", ip=None),
        pod("e-other", "other"),
    ]
    (entry,) = build_entries([full], pods, [service])

    assert (entry.name, entry.aliases, entry.adapters) == ("llama-8b", ("small",), ("sql",))
    assert (entry.strategy, entry.session_header) == (Strategy.LEAST_LOADED, "x-chat")
    assert (entry.saturation.queue_depth, entry.hold.max_held_requests, entry.hold.hold_timeout_s) == (7, 11, 12)
    assert (entry.retry.attempts, entry.retry.per_try_timeout_s) == (3, 9)
    assert (entry.scale_to_zero, entry.desired_replicas, entry.scaling_reason) == (True, 2, "kv 0.8 of 0.75")
    assert entry.endpoints == (
        Endpoint("default/a-starting", "http://10.0.0.1:8000", EndpointState.STARTING),
        Endpoint("default/b-ready", "http://[fd00::1]:8000", EndpointState.READY),
        Endpoint("default/c-leaving", "http://10.0.0.1:8000", EndpointState.DRAINING),
    )


def test_replicas_that_tell_of_their_caches_are_heard_at_their_own_address() -> None:
    told = route("m", kvEvents={"port": 5557, "replayPort": 5558})
    (entry,) = build_entries([told], [pod("a", "m"), pod("b", "m", ip="fd00::1")], [])

    assert [e.cache_events for e in entry.endpoints] == [
        CacheEvents("tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558"),
        CacheEvents("tcp://[fd00::1]:5557", "tcp://[fd00::1]:5558"),
    ]
    (entry,) = build_entries([route("m", kvEvents=None)], [pod("a", "m")], [])
    assert entry.endpoints[0].cache_events is None


def test_a_broken_route_harms_no_other_and_the_older_service_keeps_its_name(caplog: pytest.LogCaptureFixture) -> None:
    broken = route("broken")
    broken["data"] = {"route.json": "{"}
    newer = route("newer", ["m"], created="2026-11-02T00:00:00Z")
    older = route("older", ["m"], created="2026-11-01T00:00:00Z")
    registry = Registry()
    registry.publish(build_entries([newer, broken, older], [pod("p", "older")], []))

    assert [e.id for e in registry.snapshot.models["m"].endpoints] == ["default/p"]
    assert registry.snapshot.conflicts
    assert "broken-route is no readable route" in caplog.text


@contextlib.asynccontextmanager
async def following(api: KubeApi, namespace: str | None = None) -> AsyncIterator[Registry]:
    registry = Registry()
    discovery = KubernetesDiscovery(ApiServer(api.url), registry, namespace=namespace, options=QUICK)
    task = asyncio.create_task(discovery.run())
    try:
        await until(lambda: registry.synced)
        yield registry
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def ids(registry: Registry) -> list[str]:
    return [e.id.split("/")[1] for entry in registry.snapshot.models.values() for e in entry.ready]


async def test_pods_are_followed_as_they_come_become_ready_drain_and_go() -> None:
    async with KubeApi().serve() as api:
        api.put(CONFIG_MAPS, route("m"))
        api.put(PODS, pod("one", "m"))
        async with following(api) as registry:
            assert ids(registry) == ["one"]
            api.put(PODS, pod("two", "m", ready=False))
            api.put(PODS, pod("two", "m"))
            await until(lambda: ids(registry) == ["one", "two"])
            api.put(PODS, pod("one", "m", deletionTimestamp="now"))
            await until(lambda: ids(registry) == ["two"])
            api.delete(PODS, "one")
            await until(lambda: len(registry.snapshot.models["m"].endpoints) == 1)
            api.delete(CONFIG_MAPS, "m-route")
            await until(lambda: not registry.snapshot.models)


async def test_an_expired_watch_a_cut_one_and_a_silent_one_all_end_in_a_fresh_view() -> None:
    async with KubeApi().serve() as api:
        api.put(CONFIG_MAPS, route("m"))
        async with following(api) as registry:
            api.expire_history()
            api.cut_watches()
            api.put(PODS, pod("after-410", "m"))
            await until(lambda: ids(registry) == ["after-410"])

            api.silent = True
            api.put(PODS, pod("during-silence", "m"))
            await until(lambda: "during-silence" in ids(registry))
            assert api.lists.count(PODS) >= 3


async def test_without_the_api_server_the_last_view_keeps_serving() -> None:
    async with KubeApi().serve() as api:
        api.put(CONFIG_MAPS, route("m"))
        api.put(PODS, pod("one", "m"))
        async with following(api) as registry:
            version = registry.snapshot.version
            api.fail_with = 500
            api.cut_watches()
            await asyncio.sleep(0.5)
            assert ids(registry) == ["one"]
            assert registry.snapshot.version == version

            api.fail_with = None
            api.put(PODS, pod("two", "m"))
            await until(lambda: ids(registry) == ["one", "two"])


async def test_many_changes_at_once_are_few_snapshots_and_long_lists_come_in_pages() -> None:
    async with KubeApi().serve() as api:
        api.put(CONFIG_MAPS, route("m"))
        for number in range(1_200):
            api.put(PODS, pod(f"p{number:04d}", "m"))
        async with following(api) as registry:
            assert len(ids(registry)) == 1_200
            before = registry.snapshot.version
            for number in range(300):
                api.delete(PODS, f"p{number:04d}")
            await until(lambda: len(ids(registry)) == 900)
            assert registry.snapshot.version - before < 30


async def test_one_namespace_sees_only_its_own() -> None:
    async with KubeApi().serve() as api:
        api.put(CONFIG_MAPS, route("m"))
        other = route("x")
        other["metadata"]["namespace"] = "elsewhere"
        api.put(CONFIG_MAPS, other)
        async with following(api, namespace="default") as registry:
            assert list(registry.snapshot.models) == ["m"]


def test_outside_of_a_cluster_the_message_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="kubectl proxy"):
        ApiServer.in_cluster({})


def manifest(name: str, secret: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceTenant",
        "metadata": {"name": name},
        "spec": {"keySecretRefs": [{"name": secret}]} | spec,
        "status": {"keys": 1},
    }


def secret(name: str, **keys: str) -> dict[str, Any]:
    data = {k: base64.b64encode(format_hash(hash_key(v)).encode()).decode() for k, v in keys.items()}
    return {"metadata": {"name": name, "namespace": "octavo-system"}, "data": data}


async def test_tenants_and_their_keys_are_followed_and_revocation_is_prompt() -> None:
    first, second = new_key(), new_key()
    seen = TenantDirectory()

    def take(directory: TenantDirectory) -> None:
        nonlocal seen
        seen = directory

    async with KubeApi().serve() as api:
        api.put(TENANTS, manifest("team-a", "keys", weight=3))
        api.put(SECRETS, secret("keys", laptop=first))
        tenants = KubernetesTenants(ApiServer(api.url), "octavo-system", QUICK)
        task = asyncio.create_task(tenants.run(take))
        await until(lambda: seen.authenticate(first) is not None)
        api.put(SECRETS, secret("keys", laptop=second))
        await until(lambda: seen.authenticate(first) is None)
        rotated = seen.authenticate(second)
        api.put(TENANTS, manifest("team-a", "keys", suspended=True))
        await until(lambda: seen.tenants["team-a"].suspended)
        task.cancel()

    assert rotated is not None
    assert (rotated.tenant.name, rotated.key_name, rotated.tenant.weight) == ("team-a", "laptop", 3.0)


def test_one_bad_tenant_harms_no_other_and_a_shared_key_opens_nothing(caplog: pytest.LogCaptureFixture) -> None:
    good, shared = new_key(), new_key()
    directory = build_from_cluster(
        [manifest("good", "g"), manifest("bad", "g", weight=0), manifest("lost", "nowhere"),
         manifest("one", "s"), manifest("two", "s")],
        [secret("g", k=good), secret("s", k=shared)],
    )  # fmt: skip

    assert (found := directory.authenticate(good)) is None or found.tenant.name == "good"
    assert directory.authenticate(good) is not None
    assert directory.authenticate(shared) is None
    assert "spec.weight" in caplog.text
    assert "nowhere" in caplog.text


def test_what_the_operator_renders_is_what_the_gateway_reads() -> None:
    """The route of a real manifest, rendered by the operator's own code, has every field in its place here."""
    from octavo_operator.api.inference_service import InferenceService
    from octavo_operator.api.manifest import parse_manifests
    from octavo_operator.plan.planner import plan
    from octavo_operator.render.config_map import config_map

    text = """
apiVersion: serving.octavo.dev/v1alpha1
kind: InferenceService
metadata: {name: llama, namespace: team}
spec:
  model: {name: llama-8b, aliases: [small], storageUri: "hf://org/llama", format: {name: safetensors}}
  autoscaling: {minReplicas: 0, maxReplicas: 3, scaleToZero: {idleSeconds: 60}, coldStart: {maxHeldRequests: 7, holdTimeoutSeconds: 33}}
  routing: {strategy: Session, sessionHeader: x-chat, saturation: {queueDepth: 9, kvCacheUtilization: "0.5"}, retry: {attempts: 3}}
"""  # noqa: E501
    (service,) = parse_manifests(text)
    assert isinstance(service, InferenceService)
    (workload,) = plan(service).workloads
    rendered = json.loads(json.dumps(config_map(workload)))
    (found,) = build_entries([rendered], [pod("p", "llama") | {}], [])

    assert (found.name, found.aliases, found.namespace) == ("llama-8b", ("small",), "team")
    assert (found.strategy, found.session_header) == (Strategy.SESSION, "x-chat")
    assert (found.saturation.queue_depth, found.saturation.kv_cache_utilization) == (9, 0.5)
    assert (found.hold.max_held_requests, found.hold.hold_timeout_s) == (7, 33)
    assert (found.retry.attempts, found.scale_to_zero) == (3, True)


def test_a_replica_that_is_no_pod_is_found_by_its_annotation() -> None:
    local = pod("p", "m", ip=None, annotations={"serving.octavo.dev/address": "127.0.0.1:9000"})
    (found,) = build_entries([route("m")], [local], [])

    assert found.endpoints[0].url == "http://127.0.0.1:9000"
