"""Replicas that span nodes: what is rendered for them, and which groups of pods are made anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_engine.config import EngineConfig
from octavo_engine.parallel.host import read_nodes
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.desired import plan_service
from octavo_operator.groups import (
    GroupMemory,
    GroupView,
    group_views,
    groups_deployment,
    groups_to_recreate,
    newest_hashes,
)
from octavo_operator.observation import PodView, split_pods
from octavo_operator.plan import Facts, Plan, Unplannable
from octavo_operator.render import render_plan


def planned(facts: Facts | None = None, **spec: Any) -> Plan:
    spec.setdefault("runtime", {"name": "vllm"})
    spec.setdefault("parallelism", {"tensor": 8, "pipeline": 2})
    spec.setdefault("resources", {"limits": {"nvidia.com/gpu": 8}})
    document = {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "big", "namespace": "team"},
        "spec": {"model": {"storageUri": "hf://org/model"}, **spec},
    }
    return plan_service(parse(InferenceService, document), [], facts or Facts())


def rendered(plan: Plan, kind: str, replicas: int = 2) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in render_plan(plan, replicas=replicas) if o["kind"] == kind}


def env(template: dict[str, Any]) -> dict[str, Any]:
    entries = template["spec"]["containers"][0]["env"]
    return {e["name"]: e.get("value") or e["valueFrom"]["fieldRef"]["fieldPath"] for e in entries if "name" in e}


def test_a_replica_larger_than_a_node_becomes_two_stateful_sets_for_each_group() -> None:
    plan = planned()
    assert plan.workloads[0].nodes == 2
    assert rendered(plan, "Deployment") == {}
    sets = rendered(plan, "StatefulSet")
    assert sorted(sets) == ["big-g0", "big-g0-w", "big-g1", "big-g1-w"]
    leader, worker = (sets[name]["spec"] for name in ("big-g1", "big-g1-w"))
    assert (leader["replicas"], worker["replicas"], worker["ordinals"]) == (1, 1, {"start": 1})
    address = "big-g1-0.big-nodes.team.svc"
    assert env(leader["template"])["MASTER_ADDR"] == env(worker["template"])["MASTER_ADDR"] == address
    assert (env(leader["template"])["NODE_RANK"], env(leader["template"])["NNODES"]) == ("0", "2")
    assert env(worker["template"])["NODE_RANK"] == "metadata.labels['apps.kubernetes.io/pod-index']"
    assert leader["selector"]["matchLabels"].items() <= leader["template"]["metadata"]["labels"].items()
    assert worker["selector"]["matchLabels"].items() <= worker["template"]["metadata"]["labels"].items()
    selectors = [tuple(sorted(s["spec"]["selector"]["matchLabels"].items())) for s in sets.values()]
    assert len(set(selectors)) == 4, "no two sets select the same pods"


def test_only_the_first_node_serves_and_the_others_outlive_its_drain() -> None:
    plan = planned(drain={"propagationSeconds": 10, "timeoutSeconds": 60})
    sets = rendered(plan, "StatefulSet")
    (first,) = sets["big-g0"]["spec"]["template"]["spec"]["containers"]
    (other,) = sets["big-g0-w"]["spec"]["template"]["spec"]["containers"]
    assert {"readinessProbe", "livenessProbe", "startupProbe", "ports"} <= first.keys()
    assert not {"readinessProbe", "livenessProbe", "startupProbe", "ports"} & other.keys()
    assert other["lifecycle"] == {"preStop": {"sleep": {"seconds": 70}}}
    assert sets["big-g0-w"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > 70
    assert "--headless" in other["command"]
    assert "--headless" not in first["command"]
    assert "--node-rank=$(NODE_RANK)" in other["command"], "Kubernetes itself fills in the environment"
    service = rendered(plan, "Service")["big"]["spec"]["selector"]
    labels = [sets[name]["spec"]["template"]["metadata"]["labels"] for name in ("big-g0", "big-g0-w")]
    assert [service.items() <= found.items() for found in labels] == [True, False]


def test_nodes_find_each_other_before_they_are_ready_and_may_talk_on_every_port() -> None:
    plan = planned()
    assert rendered(plan, "Service")["big-nodes"]["spec"]["publishNotReadyAddresses"] is True
    policy = rendered(plan, "NetworkPolicy")["big"]["spec"]
    own = {"podSelector": {"matchLabels": {"serving.octavo.dev/inferenceservice": "big"}}}
    assert policy["podSelector"] == own["podSelector"]
    assert {"from": [own]} in policy["ingress"]


def test_where_leader_worker_sets_exist_one_of_them_is_all() -> None:
    plan = planned(Facts(leader_worker_set=True), rollout={"maxSurge": 1, "maxUnavailable": 0})
    assert rendered(plan, "StatefulSet") == {}
    (lws,) = rendered(plan, "LeaderWorkerSet", replicas=3).values()
    spec, template = lws["spec"], lws["spec"]["leaderWorkerTemplate"]
    assert (lws["metadata"]["name"], spec["replicas"], template["size"]) == ("big-nodes", 3, 2)
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert "big-nodes" not in rendered(plan, "Service"), "its controller makes that one"
    found = env(template["workerTemplate"])
    assert found["MASTER_ADDR"] == "big-nodes-$(GROUP_INDEX).big-nodes.team.svc"
    names = [e["name"] for e in template["workerTemplate"]["spec"]["containers"][0]["env"]]
    assert names.index("GROUP_INDEX") < names.index("MASTER_ADDR"), "it is filled in only if it comes before"


@pytest.mark.parametrize(
    ("spec", "path", "message"),
    [
        ({"parallelism": {"tensor": 12}}, "spec.parallelism", "6 accelerators per node"),
        ({"parallelism": {"tensor": 9}}, "spec.parallelism", "do not divide"),
        ({"runtime": {"name": "tgi"}}, "spec.parallelism", "runs on one node"),
        ({"rollout": {"canary": {"steps": [{"weight": 5, "pauseSeconds": 1}]}}}, "spec.rollout.canary", "span nodes"),
    ],
)
def test_what_cannot_span_nodes_is_refused(spec: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(Unplannable) as caught:
        planned(**spec)
    assert any(e.path == path and message in e.message for e in caught.value.errors), caught.value


def test_a_replica_that_fits_one_node_is_a_deployment_as_before() -> None:
    plan = planned(parallelism={"tensor": 8})
    assert plan.workloads[0].nodes == 1
    assert list(rendered(plan, "Deployment")) == ["big"]
    assert rendered(plan, "StatefulSet") == {}


def member(group: str = "0", *, worker: bool = False, ready: bool = True, **fields: Any) -> PodView:
    name = f"big-g{group}-w-1" if worker else f"big-g{group}-0"
    return PodView(name=name, group=group, worker=worker, ready=ready, phase="Running", scheduled=True, **fields)


def group(index: str, *, ready: bool = True, outdated: bool = False, restarts: tuple[int, int] = (0, 0)) -> GroupView:
    leader = member(index, ready=ready, restarts=restarts[0])
    return GroupView(index, leader, (member(index, worker=True, restarts=restarts[1]),), outdated)


def test_a_torn_group_is_made_anew_as_a_whole_after_ten_seconds_and_not_again_within_a_minute() -> None:
    memory, torn = GroupMemory(), group("0", ready=False, restarts=(0, 1))
    assert groups_to_recreate([torn], 0, memory, 0.0) == ()
    assert groups_to_recreate([torn], 0, memory, 9.0) == ()
    assert groups_to_recreate([torn], 0, memory, 10.0) == (torn,)
    assert groups_to_recreate([torn], 0, memory, 40.0) == ()
    assert groups_to_recreate([torn], 0, memory, 71.0) == (torn,)


def test_a_group_that_found_itself_again_or_restarted_as_a_whole_is_left_alone() -> None:
    memory = GroupMemory()
    healed, all_anew = group("0", restarts=(1, 0)), group("1", ready=False, restarts=(1, 1))
    for now in range(100):
        assert groups_to_recreate([healed, all_anew], 0, memory, float(now)) == ()


def test_outdated_groups_are_replaced_one_at_a_time() -> None:
    memory = GroupMemory()
    groups = [group(str(i), outdated=True) for i in range(3)]
    assert [g.index for g in groups_to_recreate(groups, 0, memory, 0.0)] == ["0"]
    away = [replace(groups[0], leader=member("0", ready=False, deleting=True)), *groups[1:]]
    assert groups_to_recreate(away, 0, memory, 1.0) == ()
    back = [group("0"), *groups[1:]]
    assert [g.index for g in groups_to_recreate(back, 0, memory, 2.0)] == ["1"]
    assert len(groups_to_recreate([group("5", outdated=True), group("6", outdated=True)], 2, memory, 3.0)) == 2


def test_an_outdated_group_that_does_not_serve_anyway_is_replaced_at_once() -> None:
    groups = [group("0", ready=False, outdated=True), group("1", outdated=True)]
    assert [g.index for g in groups_to_recreate(groups, 0, GroupMemory(), 0.0)] == ["0"]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.tuples(st.integers(0, 1), st.integers(0, 1))), min_size=1, max_size=6
    ),
    st.integers(0, 3),
    st.floats(0.0, 200.0),
)
def test_never_more_healthy_groups_are_taken_than_may_be_away(
    states: list[tuple[bool, bool, tuple[int, int]]], most: int, now: float
) -> None:
    groups = [group(str(i), ready=r, outdated=o, restarts=n) for i, (r, o, n) in enumerate(states)]
    chosen = groups_to_recreate(groups, most, GroupMemory(), now)
    healthy = [g for g in groups if g.available]
    taken = [g for g in chosen if g.available]
    assert len(groups) - len(healthy) + len(taken) <= max(1, most, len(groups) - len(healthy))
    assert all(g.outdated for g in taken)


def raw_pod(name: str, revision: str, *, worker: bool = False, ready: bool = True) -> dict[str, Any]:
    labels = {
        "serving.octavo.dev/group": "0",
        "app.kubernetes.io/component": "engine-worker" if worker else "engine",
        "controller-revision-hash": revision,
    }
    owner = {"name": name.rsplit("-", 1)[0], "controller": True}
    conditions = [{"type": "Ready", "status": str(ready)}, {"type": "PodScheduled", "status": "True"}]
    metadata = {"name": name, "labels": labels, "ownerReferences": [owner]}
    return {"metadata": metadata, "status": {"phase": "Running", "conditions": conditions}}


def raw_set(name: str, revision: str, seen: int = 2) -> dict[str, Any]:
    status = {"observedGeneration": seen, "updateRevision": revision, "replicas": 1}
    return {"metadata": {"name": name, "generation": 2}, "spec": {"replicas": 1}, "status": status}


def test_groups_look_like_a_deployment_of_them() -> None:
    sets = [raw_set("big-g0", "big-g0-b"), raw_set("big-g0-w", "big-g0-w-b")]
    pods = [raw_pod("big-g0-0", "big-g0-b"), raw_pod("big-g0-w-1", "big-g0-w-a", worker=True)]
    replicas, workers = split_pods(pods)
    assert [p.name for p in replicas] == ["big-g0-0"]
    groups = group_views((*replicas, *workers), newest_hashes(sets))
    assert groups[0].outdated, "one node is still of the former template"
    view = groups_deployment(sets, groups)
    assert view is not None
    assert (view.wanted, view.ready, view.updated, view.rolling) == (1, 1, 0, True)
    unseen = [raw_set("big-g0", "big-g0-b", seen=1), sets[1]]
    view = groups_deployment(unseen, group_views((*replicas, *workers), newest_hashes(unseen)))
    assert view is not None
    assert view.rolling, "the controller has not seen the newest template"


def test_octavos_own_engine_reads_what_its_nodes_are_given() -> None:
    """The environment of the rendered pods, as Kubernetes fills it in, is what the engine asks for."""
    parallelism, resources = {"tensor": 4}, {"limits": {"nvidia.com/gpu": 2}}
    plan = planned(runtime={"name": "octavo"}, parallelism=parallelism, resources=resources)
    assert "--tensor-parallel-size 4" in " ".join(plan.workloads[0].argv)
    sets = rendered(plan, "StatefulSet", replicas=1)
    config = EngineConfig(model="m", tensor_parallel_size=4)
    first = read_nodes(config, env(sets["big-g0"]["spec"]["template"]))
    given = env(sets["big-g0-w"]["spec"]["template"])
    assert given["NODE_RANK"].startswith("metadata.labels"), "filled in by the kubelet with the pod's ordinal"
    second = read_nodes(config, {**given, "NODE_RANK": str(sets["big-g0-w"]["spec"]["ordinals"]["start"])})
    assert (first.index, second.index, first.count, second.count) == (0, 1, 2, 2)
    assert [list(nodes.ranks_here(config.num_ranks)) for nodes in (first, second)] == [[0, 1], [2, 3]]
    assert (first.address, first.port) == (second.address, second.port) == ("big-g0-0.big-nodes.team.svc", 29_500)
