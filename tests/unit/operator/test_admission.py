"""Admission: what `octavo render` refuses, the webhook refuses with the same words, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from octavo_operator.admission import Verdict, answer, concerns_spec, review
from octavo_operator.api.serving_runtime import ServingRuntime
from octavo_operator.api.validation import parse
from octavo_operator.plan import Facts
from octavo_operator.plan.shape import ModelShape
from octavo_operator.plan.values import ModelFacts
from octavo_operator.presets import preset

LARGE = ModelShape(141_000_000_000, 80, 8192, 28672, 128256, 2048, 131072)


def service(**spec: Any) -> dict[str, Any]:
    spec.setdefault("model", {"storageUri": "hf://org/model"})
    return {
        "apiVersion": "serving.octavo.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "chat", "namespace": "team"},
        "spec": spec,
    }


def judged(document: dict[str, Any], **facts: Any) -> Verdict:
    return review(document, [], Facts(**facts))


def test_a_sound_service_is_taken_and_what_is_unwise_is_a_warning() -> None:
    verdict = judged(service(replicas=2))
    assert verdict.allowed
    assert any("spec.model.revision is not a commit" in text for text in verdict.warnings)
    assert all(len(text) <= 256 for text in verdict.warnings)


REFUSED = {
    "a field the runtime has not": (
        {"runtime": {"name": "tgi"}, "engine": {"blockSize": 16}, "resources": {"limits": {"nvidia.com/gpu": 1}}},
        "spec.engine.blockSize",
    ),
    "no such runtime": ({"runtime": {"name": "nobody"}}, "spec.runtime.name"),
    "a rule broken": ({"autoscaling": {"minReplicas": 3, "maxReplicas": 2}}, "minReplicas must not exceed"),
    "an unknown field": ({"modle": {}}, "spec.modle"),
    "host network": ({"podTemplate": {"spec": {"hostNetwork": True}}}, "spec.podTemplate.spec.hostNetwork"),
    "a grace period shorter than the drain": (
        {"podTemplate": {"spec": {"terminationGracePeriodSeconds": 30}}, "drain": {"timeoutSeconds": 60}},
        "must be at least 85",
    ),
    "8-bit keys on an old card": (
        {
            "runtime": {"name": "vllm"},
            "resources": {"limits": {"nvidia.com/gpu": 1}},
            "accelerator": {"type": "NVIDIA-A100-SXM4-80GB"},
            "model": {"storageUri": "hf://o/m", "quantization": {"kvCache": "FP8"}},
        },
        "compute capability",
    ),
}


@pytest.mark.parametrize(("spec", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused_with_its_path(spec: dict[str, Any], told: str) -> None:
    verdict = judged(service(**spec))
    assert not verdict.allowed
    assert told in verdict.message


def test_all_errors_are_told_at_once() -> None:
    model = {"storageUri": "hf://o/m", "task": "Transcribe"}
    verdict = judged(service(runtime={"name": "tgi"}, engine={"blockSize": 16}, model=model))
    assert "spec.engine.blockSize" in verdict.message
    assert "spec.model.task" in verdict.message


def test_a_model_that_does_not_fit_is_refused_with_numbers_and_a_way_out() -> None:
    document = service(
        resources={"limits": {"nvidia.com/gpu": 1}},
        accelerator={"minMemory": "80Gi"},
        model={"storageUri": "hf://org/model", "maxModelLen": 8192},
    )
    verdict = judged(document, model=ModelFacts(LARGE))
    assert not verdict.allowed
    assert "needs 13" in verdict.message
    assert "set spec." in verdict.message
    assert judged(document).allowed, "a model of which nothing is known is not judged"


def test_a_namespace_own_runtime_counts() -> None:
    own = preset("octavo").model_dump(by_alias=True, mode="json", exclude_unset=True)
    own |= {"kind": "ServingRuntime", "metadata": {"name": "mine", "namespace": "team"}}
    document = service(runtime={"name": "mine", "kind": "ServingRuntime"})
    assert not review(document, [], Facts()).allowed
    assert review(document, [parse(ServingRuntime, own)], Facts()).allowed


@pytest.mark.parametrize(
    ("operation", "old", "new", "expected"),
    [
        ("CREATE", None, service(), True),
        ("UPDATE", service(), service(replicas=2), True),
        ("UPDATE", service(), {**service(), "metadata": {"name": "chat", "labels": {"a": "b"}}}, False),
        ("DELETE", service(), None, False),
    ],
)
def test_only_a_changed_spec_is_judged(operation: str, old: Any, new: Any, expected: bool) -> None:
    assert concerns_spec({"operation": operation, "oldObject": old, "object": new}) is expected


def test_answers_carry_the_request_and_its_warnings() -> None:
    refused = answer({"uid": "u1"}, Verdict(False, "no"))
    assert refused["response"] == {
        "uid": "u1",
        "allowed": False,
        "status": {"code": 422, "reason": "Invalid", "message": "no"},
    }
    assert answer({"uid": "u1"}, Verdict(True, warnings=("w",)))["response"] == {
        "uid": "u1",
        "allowed": True,
        "warnings": ["w"],
    }
