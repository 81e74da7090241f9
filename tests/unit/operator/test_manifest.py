from __future__ import annotations

import io
from pathlib import Path

import pytest

from octavo_operator.api.errors import ManifestErrors
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.manifest import load_manifests, parse_manifests

HEADER = "apiVersion: serving.octavo.dev/v1alpha1\nkind: InferenceService\nmetadata: {name: chat}\nspec:\n"
GOOD = HEADER + "  model: {storageUri: 'hf://org/model'}\n"


def refused(text: str, *, local: bool = False) -> dict[str, str]:
    """Path to message of every error of a manifest."""
    with pytest.raises(ManifestErrors) as caught:
        parse_manifests(text, file="a.yaml", local=local)
    return {error.path: error.message for error in caught.value.errors}


def spec_refused(spec: str, *, local: bool = False) -> dict[str, str]:
    return refused(HEADER + spec, local=local)


def test_a_minimal_manifest_gets_every_default() -> None:
    (service,) = parse_manifests(GOOD)
    assert isinstance(service, InferenceService)
    assert service.model_name == "chat"
    assert service.spec.drain.timeout_seconds == 300
    assert service.spec.routing.strategy == "PrefixAware"


def test_several_errors_are_reported_at_once_with_path_value_and_what_is_allowed() -> None:
    errors = spec_refused(
        "  replica: 1\n"
        "  model: {storageUri: 'hf://a/b', maxModelLen: '12', task: Chat}\n"
        "  autoscaling: {maxReplica: 2, metrics: [{type: KV, target: 0.75}]}\n"
        "  resources: {limits: {cpu: much}}\n"
    )
    assert errors == {
        "spec.replica": "unknown field; did you mean replicas?",
        "spec.model.maxModelLen": "must be a whole number",
        "spec.model.task": "must be 'Generate', 'Embed', 'Score' or 'Transcribe'",
        "spec.autoscaling.maxReplica": "unknown field; did you mean maxReplicas?",
        "spec.autoscaling.metrics[0].type": (
            "must be 'KVCacheUtilization', 'QueueDepth', 'Concurrency' or 'TimeToFirstToken'"
        ),
        "spec.autoscaling.metrics[0].target": 'must be a string; write it in quotes, such as "0.75"',
        "spec.resources.limits.cpu": 'must be a quantity such as 8, "500m" or "16Gi"',
    }


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("  model: {storageUri: 'ftp://a/b'}\n", "spec.model.storageUri"),
        ("  model: {storageUri: 'hf://a/b', format: {name: gguf}, quantization: {weights: Int4}}\n",
         "spec.model.quantization.weights"),
        ("  model: {storageUri: 'hf://a/b', task: Embed, speculative: {draftStorageUri: 'hf://a/c'}}\n",
         "spec.model.speculative"),
        ("  model: {storageUri: 'hf://a/b'}\n  replicas: 2\n  autoscaling: {maxReplicas: 3}\n", "spec.replicas"),
        ("  model: {storageUri: 'hf://a/b'}\n  autoscaling: {mode: External}\n", "spec.replicas"),
        ("  model: {storageUri: 'hf://a/b'}\n  autoscaling: {minReplicas: 3, maxReplicas: 2}\n",
         "spec.autoscaling.minReplicas"),
        ("  model: {storageUri: 'hf://a/b'}\n  autoscaling: {minReplicas: 0}\n", "spec.autoscaling.scaleToZero"),
        ("  model: {storageUri: 'hf://a/b'}\n  autoscaling: {minReplicas: 1, scaleToZero: {}}\n",
         "spec.autoscaling.minReplicas"),
        ("  model: {storageUri: 'hf://a/b'}\n  autoscaling: {metrics: [{type: TimeToFirstToken, target: '2'}]}\n",
         "spec.autoscaling.metrics"),
        ("  model: {storageUri: 'hf://a/b'}\n"
         "  autoscaling: {metrics: [{type: QueueDepth, target: '2'}, {type: QueueDepth, target: '3'}]}\n",
         "spec.autoscaling.metrics"),
        ("  model: {storageUri: 'hf://a/b'}\n  rollout: {maxSurge: 0}\n", "spec.rollout.maxUnavailable"),
        ("  model: {storageUri: 'hf://a/b'}\n  routing: {strategy: Session}\n", "spec.routing.sessionHeader"),
        ("  model: {storageUri: 'hf://a/b'}\n  engine: {env: [{name: LD_PRELOAD, value: x}]}\n",
         "spec.engine.env[0].name"),
        ("  model: {storageUri: 'hf://a/b'}\n  engine: {kvCacheMemory: 1Gi, kvCacheMemoryFraction: '0.5'}\n",
         "spec.engine.kvCacheMemoryFraction"),
        ("  model: {storageUri: 'hf://a/b'}\n  rollout: {canary: {steps: [{weight: 5, pauseSeconds: 9}, "
         "{weight: 5, pauseSeconds: 9}]}}\n", "spec.rollout.canary.steps"),
    ],
)  # fmt: skip
def test_each_rule_names_the_field_it_guards(spec: str, path: str) -> None:
    assert list(spec_refused(spec)) == [path]


def test_a_file_address_is_for_local_mode_only() -> None:
    text = HEADER + "  model: {storageUri: 'file:///models/a.gguf'}\n"
    assert parse_manifests(text, local=True)
    assert "file:// works in local mode only" in refused(text)["spec.model.storageUri"]


def test_unknown_kind_and_version_say_what_is_known() -> None:
    errors = refused("apiVersion: serving.kserve.io/v1beta1\nkind: InferenceServise\nmetadata: {name: a}\n")
    assert errors["kind"] == "did you mean InferenceService?"
    assert errors["apiVersion"] == "must be serving.octavo.dev/v1alpha1"


@pytest.mark.parametrize("name", ["-a", "1a", "A", "a" * 51, "a.b"])
def test_names_that_cannot_name_a_kubernetes_service_are_refused(name: str) -> None:
    assert list(refused(GOOD.replace("name: chat", f"name: '{name}'"))) == ["metadata.name"]


def test_yaml_errors_say_where(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("a: [1\nb: 2\n")
    with pytest.raises(ManifestErrors, match=r"bad\.yaml document 1: is not valid YAML: line 2"):
        load_manifests([file])


def test_a_key_written_twice_is_refused() -> None:
    assert "appears twice" in refused(GOOD + "  replicas: 1\n  replicas: 2\n")[""]


def test_times_and_dates_stay_text_as_kubernetes_reads_them() -> None:
    text = GOOD + (
        "  autoscaling:\n    schedules:\n"
        "      - {name: day, daysOfWeek: [Mon], startTime: 08:00, endTime: 19:00, minReplicas: 1}\n"
    )
    (service,) = parse_manifests(text)
    assert isinstance(service, InferenceService)
    assert service.spec.autoscaling is not None
    assert service.spec.autoscaling.schedules[0].end_time == "19:00"


def test_files_folders_and_standard_input_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.yaml").write_text(GOOD.replace("chat", "b") + "---\n" + GOOD.replace("chat", "c"))
    (tmp_path / "a.json").write_text(
        '{"apiVersion": "serving.octavo.dev/v1alpha1", "kind": "InferenceService", "metadata": {"name": "a"},'
        ' "spec": {"model": {"storageUri": "hf://a/b"}}}'
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(GOOD))
    assert [r.metadata.name for r in load_manifests([tmp_path, "-"])] == ["a", "b", "c", "chat"]


def test_errors_of_several_files_are_collected(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.replace("hf:", "x:"))
    with pytest.raises(ManifestErrors) as caught:
        load_manifests([tmp_path / "a.yaml", tmp_path / "missing.yaml"])
    assert [Path(e.file).name for e in caught.value.errors] == ["a.yaml", "missing.yaml"]


def test_the_same_resource_twice_is_refused() -> None:
    with pytest.raises(ManifestErrors, match="appears twice"):
        load_manifests_text(GOOD + "---\n" + GOOD)


def load_manifests_text(text: str) -> None:
    import sys

    original, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        load_manifests(["-"])
    finally:
        sys.stdin = original


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(ManifestErrors) as caught:
        parse_manifests(GOOD.replace("hf://org/model", "x" * 500))
    assert len(caught.value.errors[0].value) < 100
