from __future__ import annotations

from pathlib import Path

import pytest

from octavo_cli.local.manifests import local_workloads
from octavo_operator.api.errors import ManifestErrors

HEAD = "apiVersion: serving.octavo.dev/v1alpha1\nkind: InferenceService\n"


def write(folder: Path, *documents: str) -> str:
    path = folder / "services.yaml"
    path.write_text("---\n".join(HEAD + document for document in documents))
    return str(path)


def errors_of(path: str) -> list[str]:
    with pytest.raises(ManifestErrors) as raised:
        local_workloads([path])
    return [str(error) for error in raised.value.errors]


def test_a_service_becomes_a_workload_that_needs_no_propagation(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "metadata: {name: a}\nspec: {model: {storageUri: 'file:///m.gguf'}, drain: {propagationSeconds: 9}}\n",
    )
    (workload,), warnings = local_workloads([path])
    assert workload.model_names == ("a",)
    assert workload.drain.propagation_s == 0
    assert warnings == []


def test_errors_of_every_document_are_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "metadata: {name: a}\nspec: {model: {storageUri: 'file:///m.gguf', maxModelLn: 3}}\n",
        "metadata: {name: b}\nspec: {model: {storageUri: 'pvc://claim/m'}, podTemplate: {spec: {}}}\n",
    )
    text = "\n".join(errors_of(path))
    assert "InferenceService/a): spec.model.maxModelLn: unknown field; did you mean maxModelLen?" in text
    assert "spec.model.storageUri: works on a cluster only" in text
    assert "spec.podTemplate" in text


def test_two_services_may_not_share_a_model_name(tmp_path: Path) -> None:
    spec = "spec: {model: {storageUri: 'file:///m.gguf', name: same}}\n"
    (error,) = errors_of(write(tmp_path, f"metadata: {{name: a}}\n{spec}", f"metadata: {{name: b}}\n{spec}"))
    assert "InferenceService/b" in error
    assert "taken by InferenceService/a" in error


def test_a_file_without_a_service_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    assert "no resource found" in errors_of(str(path))[0]
