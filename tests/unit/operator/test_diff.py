from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.diff import holds, identity, reconcile, stamped
from octavo_operator.plan import plan
from octavo_operator.render import Owner, render_plan

OWNER = Owner("InferenceService", "chat", "uid-1")


def desired(**spec: Any) -> list[dict[str, Any]]:
    spec.setdefault("model", {"storageUri": "hf://org/model"})
    service = parse(
        InferenceService,
        {
            "apiVersion": "serving.octavo.dev/v1alpha1",
            "kind": "InferenceService",
            "metadata": {"name": "chat", "namespace": "team"},
            "spec": spec,
        },
    )
    return stamped(render_plan(plan(service), OWNER))


def served(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The objects as an API server gives them back: with defaults, uids and its own notation."""
    found = copy.deepcopy(objects)
    for obj in found:
        obj["metadata"] |= {"uid": "u", "resourceVersion": "1", "managedFields": [{}]}
        if obj["kind"] == "Deployment":
            pod = obj["spec"]["template"]["spec"]
            pod |= {"restartPolicy": "Always", "dnsPolicy": "ClusterFirst"}
            pod["containers"][0]["imagePullPolicy"] = "Always"
            pod["containers"][0]["startupProbe"] |= {"successThreshold": 1}
            pod["containers"][0]["startupProbe"]["httpGet"]["scheme"] = "HTTP"
    return found


def test_everything_is_applied_when_nothing_is_there() -> None:
    wanted = desired()
    changes = reconcile(wanted, [], OWNER.uid)
    assert changes.apply == tuple(wanted)
    assert changes.delete == ()


def test_nothing_is_written_when_the_cluster_holds_what_is_wanted_with_its_own_defaults() -> None:
    assert reconcile(desired(), served(desired()), OWNER.uid).none


@pytest.mark.parametrize(("wanted", "found"), [("1000m", "1"), ("1024Mi", "1Gi"), ("1", 1)])
def test_quantities_are_compared_by_value(wanted: Any, found: Any) -> None:
    assert holds({"limits": {"cpu": wanted}}, {"limits": {"cpu": found}})
    assert not holds({"limits": {"cpu": wanted}}, {"limits": {"cpu": "7"}})


def test_each_drift_in_a_field_of_ours_is_repaired() -> None:
    wanted = desired()
    for index, obj in enumerate(wanted):
        drifted = served(wanted)
        drifted[index]["metadata"]["labels"] = {}
        changes = reconcile(wanted, drifted, OWNER.uid)
        assert [identity(o) for o in changes.apply] == [identity(obj)]


def test_fields_of_others_are_left_alone() -> None:
    found = served(desired())
    found[-1]["metadata"]["labels"]["theirs"] = "1"
    found[-1]["spec"]["template"]["spec"]["containers"].append({"name": "injected", "image": "x"})
    assert reconcile(desired(), found, OWNER.uid).none


def test_taking_something_out_of_the_wish_is_noticed_although_all_that_is_left_is_there() -> None:
    before = desired(engine={"env": [{"name": "A", "value": "1"}]})
    assert [o["kind"] for o in reconcile(desired(), served(before), OWNER.uid).apply] == ["Deployment"]


def test_what_is_no_longer_wanted_goes_if_it_is_ours() -> None:
    found = served(desired(observability={"podMonitor": True}))
    foreign = copy.deepcopy(found[0])
    foreign["metadata"] |= {"name": "foreign", "ownerReferences": []}
    going = copy.deepcopy(found[0])
    going["metadata"] |= {"name": "going", "deletionTimestamp": "2026-01-01T00:00:00Z"}
    changes = reconcile(desired(), [*found, foreign, going], OWNER.uid)
    assert [o["kind"] for o in changes.delete] == ["PodMonitor"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_crashing_at_any_step_and_looking_again_ends_in_the_same_state(seed: int) -> None:
    """Apply changes in random order, stop anywhere, lose or duplicate looks: the end is always the wanted state."""
    dice = random.Random(seed)
    wanted = desired()
    cluster = {identity(o): o for o in served(desired(observability={"podMonitor": True}))}
    for obj in dice.sample(list(cluster.values()), dice.randint(0, len(cluster))):
        if dice.random() < 0.5:
            del cluster[identity(obj)]
        else:
            obj["metadata"]["labels"] = {"drifted": "1"}
    for _ in range(20):
        changes = reconcile(wanted, cluster.values(), OWNER.uid)
        if changes.none:
            break
        steps = [("apply", o) for o in changes.apply] + [("delete", o) for o in changes.delete]
        dice.shuffle(steps)
        for what, obj in steps[: dice.randint(1, len(steps))]:
            if what == "apply":
                cluster[identity(obj)] = served([obj])[0]
            else:
                cluster.pop(identity(obj), None)
    assert reconcile(wanted, cluster.values(), OWNER.uid).none
    assert cluster.keys() == {identity(o) for o in wanted}
