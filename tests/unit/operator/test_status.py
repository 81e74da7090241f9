from __future__ import annotations

from typing import Any

import pytest

from octavo_operator.adapters import AdapterState, AdapterView
from octavo_operator.api.errors import FieldError
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.validation import parse
from octavo_operator.autoscale.decide import decide
from octavo_operator.autoscale.history import History
from octavo_operator.autoscale.observer import Capacity
from octavo_operator.autoscale.policy import ScalingPolicy
from octavo_operator.autoscale.signals import Signals
from octavo_operator.desired import plan_service
from octavo_operator.faults import find_fault, last_line
from octavo_operator.judgement import Judgement, Scaling
from octavo_operator.observation import Observation, observe
from octavo_operator.plan import Facts, Unplannable, plan
from octavo_operator.routes import RouteView
from octavo_operator.status import service_status, without_change

NOW = 1_800_000_000.0
READY = {"type": "Ready", "status": "True", "lastTransitionTime": "2027-01-15T08:00:41Z"}
SCHEDULED = {"type": "PodScheduled", "status": "True"}


def service(status: dict[str, Any] | None = None, **spec: Any) -> InferenceService:
    spec.setdefault("model", {"storageUri": "hf://org/model"})
    document = {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "chat", "namespace": "team", "generation": 3},
        "spec": spec,
    }
    return parse(InferenceService, document if status is None else {**document, "status": status})


def deployment(wanted: int = 1, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "chat", "generation": 1},
        "spec": {"replicas": wanted},
        "status": {"observedGeneration": 1, "replicas": wanted, "updatedReplicas": wanted, **status},
    }


def pod(
    name: str = "chat-1", *, phase: str = "Running", conditions: Any = (SCHEDULED,), **container: Any
) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "creationTimestamp": "2027-01-15T08:00:00Z"},
        "status": {
            "phase": phase,
            "conditions": list(conditions),
            "containerStatuses": [{"name": "engine", "restartCount": 0, **container}],
        },
    }


READY_POD = pod(conditions=(SCHEDULED, READY), started=True, ready=True)


def judged(observation: Observation, subject: InferenceService | None = None, **changes: Any) -> dict[str, Any]:
    subject = subject or service()
    if "plan" not in changes:
        changes["plan"] = plan(subject)
    changes.setdefault("refusal", None)
    return service_status(Judgement(service=subject, observation=observation, now=NOW, **changes))


def conditions(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {c["type"]: (c["status"], c["reason"]) for c in status["conditions"]}


def crashed(message: str = "", *, reason: str = "Error", code: int = 1) -> dict[str, Any]:
    ended = {"exitCode": code, "reason": reason, "message": message}
    return pod(state={"waiting": {"reason": "CrashLoopBackOff"}}, lastState={"terminated": ended}, restartCount=3)


def unscheduled(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return pod(phase="Pending", conditions=(condition,))


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return pod(phase="Pending", state={"waiting": {"reason": reason, "message": message}})


def failure(message: str) -> dict[str, Any]:
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    return deployment(conditions=[condition])


FAULTS = [
    ("no GPU in the cluster", unscheduled("0/4 nodes are available: 4 Insufficient nvidia.com/gpu."),
     "PodsScheduled", "InsufficientGPU", "add GPU nodes"),
    ("too little memory in the cluster", unscheduled("0/4 nodes are available: 4 Insufficient memory."),
     "PodsScheduled", "InsufficientResources", "spec.resources"),
    ("an untolerated taint", unscheduled("1 node(s) had untolerated taint {gpu: }"),
     "PodsScheduled", "UntoleratedTaint", "spec.scheduling.tolerations"),
    ("no node of that type", unscheduled("4 node(s) didn't match Pod's node affinity/selector"),
     "PodsScheduled", "NoMatchingNode", "spec.accelerator.type"),
    ("an unbound volume", unscheduled("pod has unbound immediate PersistentVolumeClaims"),
     "PodsScheduled", "VolumeNotBound", "StorageClass"),
    ("quota", failure('pods "chat-1" is forbidden: exceeded quota: team, requested: cpu=2'),
     "PodsScheduled", "QuotaExceeded", "ResourceQuota"),
    ("pod security", failure('violates PodSecurity "restricted:latest": x'),
     "PodsScheduled", "PodSecurityViolation", "spec.podTemplate"),
    ("a webhook that is down", failure('failed calling webhook "x": connection refused'),
     "PodsScheduled", "AdmissionRefused", "webhook"),
    ("an image that cannot be pulled", waiting("ImagePullBackOff", "pull access denied"),
     "ModelReady", "ImagePullFailed", "pull secret"),
    ("a secret that is absent", waiting("CreateContainerConfigError", 'secret "hub" not found'),
     "ModelReady", "ContainerConfigError", "Secrets"),
    ("out of memory", crashed(reason="OOMKilled", code=137),
     "ModelReady", "OOMKilled", "spec.resources.limits.memory"),
    ("a hub that answers 401", crashed("ModelLoadError: hf://o/m: 401 Unauthorized"),
     "ModelReady", "ModelUnauthorized", "credentialsSecretRef"),
    ("a gated model", crashed("403 Forbidden: gated repo"), "ModelReady", "ModelForbidden", "access"),
    ("a hub that answers 404", crashed("404 Not Found: hf://o/m"), "ModelReady", "ModelNotFound", "storageUri"),
    ("a hub that answers 429", crashed("429 Too Many Requests"), "ModelReady", "ModelRateLimited", "ModelCache"),
    ("a model that does not fit", crashed("KV cache: not enough memory for one request"),
     "ModelReady", "DoesNotFit", "maxModelLen"),
    ("bad quantization", crashed("int4 quantization needs AVX2"),
     "ModelReady", "QuantizationUnsupported", "quantization"),
    ("bad arguments", crashed("Error: No such option: --x"), "ModelReady", "BadArguments", "extraArgs"),
    ("no network", crashed("Temporary failure in name resolution"), "ModelReady", "ModelUnreachable", "network policy"),
    ("a crash loop", crashed("ValueError: boom"), "ModelReady", "CrashLoop", "kubectl logs chat-1 --previous"),
    ("a killed engine", crashed(code=137), "ModelReady", "EngineKilled", "probes"),
    ("a failing probe", pod(started=True, ready=False, state={"running": {}}),
     "ModelReady", "ReadinessProbeFailed", "kubectl describe pod chat-1"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "type_", "reason", "hint"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_each_fault_gives_its_condition_with_the_next_step_and_clears_again(
    fault: dict[str, Any], type_: str, reason: str, hint: str
) -> None:
    broken = observe(fault, []) if "spec" in fault else observe(deployment(), [fault])
    status = judged(broken)
    assert conditions(status)[type_] == ("False", reason)
    assert conditions(status)["Ready"] == ("False", reason)
    message = next(c["message"] for c in status["conditions"] if c["type"] == type_)
    assert hint in message
    healed = judged(observe(deployment(), [READY_POD]), service(status=status))
    assert conditions(healed)["Ready"] == ("True", "MinimumReplicasAvailable")
    assert conditions(healed)[type_][0] == "True"


def test_a_pod_that_loads_is_no_fault() -> None:
    loading = observe(deployment(), [pod(started=False, state={"running": {}})])
    assert find_fault(loading) is None
    assert conditions(judged(loading))["ModelReady"] == ("Unknown", "Loading")
    assert conditions(judged(loading))["Ready"] == ("False", "ReplicasNotReady")


def test_a_broken_replica_beside_ready_ones_degrades_but_does_not_unready() -> None:
    observation = observe(deployment(2), [READY_POD, {**crashed("boom"), "metadata": {"name": "chat-2"}}])
    seen = conditions(judged(observation))
    assert seen["Ready"] == ("True", "MinimumReplicasAvailable")
    assert seen["Degraded"] == ("True", "CrashLoop")


def test_fewer_replicas_than_promised_are_not_ready() -> None:
    subject = service(replicas=2)
    seen = conditions(judged(observe(deployment(2), [READY_POD]), subject))
    assert seen["Ready"] == ("False", "ReplicasNotReady")
    assert seen["Degraded"] == ("True", "FewerThanMinimum")


def test_a_service_scaled_to_zero_is_ready_to_wake() -> None:
    subject = service(autoscaling={"minReplicas": 0, "maxReplicas": 1, "scaleToZero": {}})
    assert conditions(judged(observe(deployment(0), []), subject))["Ready"] == ("True", "ScaledToZero")


def test_a_suspended_service_says_so() -> None:
    assert conditions(judged(observe(deployment(0), []), service(suspend=True)))["Ready"] == ("False", "Suspended")


def test_a_refused_spec_names_field_and_value_while_old_replicas_serve_on() -> None:
    refusal = Unplannable("UnsupportedField", [FieldError("spec.engine.seed", "the runtime has no such setting", "1")])
    seen = judged(observe(deployment(), [READY_POD]), plan=None, refusal=refusal)
    assert conditions(seen)["RuntimeResolved"] == ("False", "UnsupportedField")
    assert conditions(seen)["Ready"][0] == "True"
    assert conditions(seen)["Degraded"] == ("True", "UnsupportedField")
    message = next(c["message"] for c in seen["conditions"] if c["type"] == "RuntimeResolved")
    assert message == "spec.engine.seed: the runtime has no such setting (got 1)"


def test_transition_times_move_only_with_the_status() -> None:
    first = judged(observe(deployment(), []))
    assert {c["lastTransitionTime"] for c in first["conditions"]} == {"2027-01-15T08:00:00Z"}
    earlier = [{**c, "lastTransitionTime": "2020-01-01T00:00:00Z"} for c in first["conditions"]]
    again = judged(observe(deployment(), []), service(status={"conditions": earlier}))
    assert {c["lastTransitionTime"] for c in again["conditions"]} == {"2020-01-01T00:00:00Z"}
    healed = judged(observe(deployment(), [READY_POD]), service(status={"conditions": earlier}))
    moved = {c["type"] for c in healed["conditions"] if c["lastTransitionTime"] != "2020-01-01T00:00:00Z"}
    assert "Ready" in moved
    assert "Degraded" not in moved


def test_start_up_is_measured_and_the_last_failure_kept() -> None:
    status = judged(observe(deployment(2), [READY_POD, {**crashed("boom\n"), "metadata": {"name": "chat-2"}}]))
    assert status["model"]["loadSecondsP50"] == 41
    assert status["model"]["lastFailure"] == "boom"


def test_every_decision_is_explained_and_every_change_remembered() -> None:
    decision = decide(Signals(1, 1), ScalingPolicy(max_replicas=3), History(NOW), NOW)
    subject = service(autoscaling={"maxReplicas": 3}, status={"scaling": {"history": [
        {"time": "2020-01-01T00:00:00Z", "from": 2, "to": 1, "reason": "old"}]}})  # fmt: skip
    status = judged(
        observe(deployment(), [READY_POD]), subject, decision=decision, scalings=(Scaling(NOW, 1, 2, "busy"),)
    )
    assert status["scaling"]["decision"]["reason"] == "MetricsStale"
    assert [e["reason"] for e in status["scaling"]["history"]] == ["busy", "old"]
    assert status["scaling"]["lastScaleTime"] == "2027-01-15T08:00:00Z"
    assert conditions(status)["ScalingActive"] == ("False", "MetricsStale")


def test_the_same_observation_gives_the_same_status() -> None:
    first = judged(observe(deployment(), [READY_POD]))
    second = judged(observe(deployment(), [READY_POD]), service(status=first))
    assert without_change(first, second)
    assert not without_change(first, judged(observe(deployment(), []), service(status=first)))


def test_log_lines_are_shortened() -> None:
    assert last_line("a\n\n  b  \n") == "b"
    assert len(last_line("x" * 10_000)) == 300


GATEWAYS = {
    "another namespace has the name": (RouteView(2, 2, 0, "other"), "http://gw", ("False", "ModelNameTaken")),
    "every gateway serves it": (RouteView(2, 2, 2), "http://gw", ("True", "Published")),
    "a gateway does not know it yet": (RouteView(2, 2, 1), "http://gw", ("Unknown", "Publishing")),
    "no gateway answers": (RouteView(2, 0, 0), "http://gw", ("Unknown", "GatewaySilent")),
    "the gateway's pods are gone": (RouteView(), "http://gw", ("Unknown", "NoGateway")),
    "no gateway is installed": (RouteView(), "", ("True", "ServiceOnly")),
}


@pytest.mark.parametrize(("route", "url", "expected"), GATEWAYS.values(), ids=GATEWAYS)
def test_the_route_is_ready_when_every_gateway_that_answers_serves_the_model(
    route: RouteView, url: str, expected: tuple[str, str]
) -> None:
    seen = conditions(judged(observe(deployment(), [READY_POD]), route=route, gateway_url=url))
    assert seen["RouteReady"] == expected
    assert seen["Ready"][0] == ("False" if expected[0] == "False" else "True"), "requests would go elsewhere"


def test_what_was_said_of_the_route_holds_until_gateways_were_asked() -> None:
    first = judged(observe(deployment(), [READY_POD]), route=RouteView(1, 1, 0, "other"), gateway_url="http://gw")
    again = judged(observe(deployment(), [READY_POD]), service(status=first), gateway_url="http://gw")
    assert conditions(again)["RouteReady"] == ("False", "ModelNameTaken")


def test_measured_capacity_is_shown_and_says_that_the_model_fits() -> None:
    subject = service(model={"storageUri": "hf://org/model", "maxModelLen": 16_384})
    measured = Capacity(kv_tokens=118_000, peak_tokens_per_minute=500)
    status = judged(observe(deployment(), [READY_POD]), subject, capacity=measured, revision="a1")
    assert status["capacity"] == {
        "kvTokensPerReplica": 118_000,
        "maxConcurrencyAtMaxLen": 7,
        "peakTokensPerMinute": 500,
        "revision": "a1",
    }
    assert conditions(status)["FitsAccelerator"] == ("True", "Measured")


def test_a_peak_survives_a_restart_of_the_operator_and_is_forgotten_with_its_revision() -> None:
    first = judged(observe(deployment(), []), capacity=Capacity(100, 10, 900), revision="a1")
    same = judged(observe(deployment(), []), service(status=first), capacity=Capacity(None, None, 30), revision="a1")
    assert same["capacity"] == first["capacity"]
    other = judged(observe(deployment(), []), service(status=first), capacity=Capacity(None, None, 30), revision="b2")
    assert other["capacity"] == {"peakTokensPerMinute": 30, "revision": "b2"}


def test_a_model_that_did_not_fit_says_so_and_one_never_run_is_not_judged() -> None:
    crash = observe(deployment(), [crashed("KV cache: not enough memory for one request")])
    assert conditions(judged(crash))["FitsAccelerator"] == ("False", "DoesNotFit")
    assert conditions(judged(observe(deployment(), [])))["FitsAccelerator"] == ("Unknown", "NotEstimated")


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        ((), ("True", "NoAdapters")),
        ((AdapterView("sql", AdapterState.LOADED, 1),), ("True", "AllLoaded")),
        ((AdapterView("sql", AdapterState.PENDING), AdapterView("b", AdapterState.LOADED, 1)), ("False", "Loading")),
        ((AdapterView("sql", AdapterState.FAILED, 0, "rank too large"),), ("False", "AdapterFailed")),
    ],
)
def test_adapters_are_ready_when_every_replica_holds_them_and_never_unready_the_base(
    views: tuple[AdapterView, ...], expected: tuple[str, str]
) -> None:
    status = judged(observe(deployment(), [READY_POD]), adapters=views)
    assert conditions(status)["AdaptersReady"] == expected
    assert conditions(status)["Ready"][0] == "True"
    assert [a["name"] for a in status.get("adapters", [])] == [view.name for view in views]


def test_during_a_rollout_both_revisions_are_listed_with_their_share() -> None:
    def of(name: str, template: str, source: dict[str, Any]) -> dict[str, Any]:
        labels = {"pod-template-hash": template}
        return {**source, "metadata": {**source["metadata"], "name": name, "labels": labels}}

    old = [of(f"old-{i}", "7f9c", READY_POD) for i in range(3)]
    status = judged(observe(deployment(4), [*old, of("new-1", "8aa1", READY_POD), of("new-2", "8aa1", pod())]))
    assert status["revisions"] == [
        {"name": "chat-7f9c", "weight": 75, "readyReplicas": 3},
        {"name": "chat-8aa1", "weight": 25, "readyReplicas": 1},
    ]


def test_a_peak_alone_is_no_news() -> None:
    first = judged(observe(deployment(), [READY_POD]), capacity=Capacity(100, 10, 900))
    higher = judged(observe(deployment(), [READY_POD]), capacity=Capacity(100, 10, 950))
    smaller = judged(observe(deployment(), [READY_POD]), capacity=Capacity(90, 10, 950))
    assert without_change(first, higher)
    assert not without_change(first, smaller)


def test_an_operator_that_has_just_started_says_what_was_said_before() -> None:
    adapters = {"items": [{"name": "sql", "storageUri": "hf://o/sql"}]}
    subject = {"model": {"storageUri": "hf://org/model", "adapters": adapters}, "runtime": {"name": "vllm"}}
    seen = observe(deployment(), [READY_POD])
    vllm = plan_service(service(**subject, resources={"limits": {"nvidia.com/gpu": 1}}), [], Facts())
    first = judged(
        seen,
        service(**subject),
        plan=vllm,
        revision="a1",
        capacity=Capacity(118_000, 16_384, 900),
        adapters=(AdapterView("sql", AdapterState.LOADED, 1),),
        route=RouteView(1, 1, 1),
        gateway_url="http://gw",
    )
    restarted = judged(seen, service(status=first, **subject), plan=vllm, revision="a1", gateway_url="http://gw")
    assert restarted["conditions"] == first["conditions"]
    assert restarted == first
