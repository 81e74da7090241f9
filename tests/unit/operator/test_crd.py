from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import pytest
import yaml

from octavo_operator.api import crd
from octavo_operator.api.base import Part
from octavo_operator.presets import preset_names

ROOT = Path(__file__).parents[3]
CRDS = {d.kind.__name__: crd.custom_resource_definition(d) for d in crd.DEFINITIONS}
EXAMPLES = [
    pytest.param(document, id=f"{path.name}-{index}")
    for path in sorted((ROOT / "examples").glob("*.yaml"))
    for index, document in enumerate(yaml.safe_load_all(path.read_text()))
    if document and document["apiVersion"].startswith("serving.octavo.dev/")
]


def schema_of(kind: str) -> dict[str, Any]:
    schema: dict[str, Any] = CRDS[kind]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema node with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], f"{path}{{}}")


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """The value with the schema's defaults filled in, as the API server does."""
    if isinstance(value, dict):
        filled = dict(value)
        for name, child in schema.get("properties", {}).items():
            if name not in filled and "default" in child:
                filled[name] = child["default"]
            if name in filled:
                filled[name] = with_defaults(filled[name], child)
        return filled
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    return value


def test_files_are_what_the_typed_api_says() -> None:
    for folder in crd.FOLDERS:
        assert crd.drift(ROOT / folder) == [], "run `make crds`"


def test_check_mode_names_stale_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert crd.main([str(tmp_path)]) == 0
    assert crd.main(["--check", str(tmp_path)]) == 0
    stale = tmp_path / "serving.octavo.dev_modelcaches.yaml"
    stale.write_text("edited")
    (tmp_path / "extra.yaml").write_text("")
    assert crd.main(["--check", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("out of date") == 2


@pytest.mark.parametrize("name", sorted(crd.render_crds()))
def test_each_crd_is_below_64_kilobytes(name: str) -> None:
    assert len(crd.render_crds()[name].encode()) < 64 * 1024


@pytest.mark.parametrize("kind", sorted(CRDS))
def test_schemas_are_structural_and_described(kind: str) -> None:
    for path, node in nodes(schema_of(kind)):
        known = {"type", "x-kubernetes-int-or-string"} & node.keys()
        assert known, f"{kind}{path} has no type"
        assert not {"anyOf", "$ref", "allOf", "title", "oneOf"} & node.keys(), f"{kind}{path}"
        named = path and path not in (".apiVersion", ".kind", ".metadata") and not path.endswith(("[]", "{}"))
        assert not named or node.get("description"), f"{kind}{path} has no description"


@pytest.mark.parametrize("kind", sorted(CRDS))
def test_lists_and_texts_of_specs_are_bounded(kind: str) -> None:
    """The API server refuses rules over unbounded lists: their cost cannot be estimated."""
    for path, node in nodes(schema_of(kind)["properties"]["spec"]):
        if node.get("type") == "array":
            assert "maxItems" in node, f"{kind}.spec{path}"


@pytest.mark.parametrize("kind", sorted(CRDS))
def test_rules_are_valid_cel(kind: str) -> None:
    for _, node in nodes(schema_of(kind)):
        for rule in node.get("x-kubernetes-validations", []):
            _program(rule["rule"])


@pytest.mark.parametrize("kind", sorted(CRDS))
def test_what_is_observed_has_no_defaults(kind: str) -> None:
    status = schema_of(kind)["properties"].get("status", {})
    assert [path for path, node in nodes(status) if "default" in node] == []


@pytest.mark.parametrize("document", EXAMPLES)
def test_examples_are_valid_against_schema_and_rules(document: dict[str, Any]) -> None:
    schema = schema_of(document["kind"])
    filled = with_defaults(document, schema)
    jsonschema.validate(filled, _for_jsonschema(schema))
    for broken in _broken_rules(filled, schema):
        pytest.fail(broken)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_against_schema_and_rules(name: str) -> None:
    text = (ROOT / "operator/octavo_operator/presets" / f"{name}.yaml").read_text()
    test_examples_are_valid_against_schema_and_rules(yaml.safe_load(text))


def test_cel_and_python_agree_on_every_rule_that_both_can_check() -> None:
    """Each example, with one field after another removed or zeroed, is judged alike by CEL and by Python."""
    from octavo_operator.api.errors import ManifestErrors
    from octavo_operator.api.validation import parse_resource

    compared = 0
    for parameter in EXAMPLES[:1]:
        document = parameter.values[0]
        schema = schema_of(document["kind"])
        for changed in islice(_mutations(document), 0, None, 4):
            filled = with_defaults(changed, schema)
            try:
                jsonschema.validate(filled, _for_jsonschema(schema))
            except jsonschema.ValidationError:
                continue
            by_cel = sorted(_broken_rules(filled, schema))
            try:
                parse_resource(changed)
                by_python: list[str] = []
            except ManifestErrors as wrong:
                by_python = [e.message for e in wrong.errors]
            assert bool(by_cel) == bool(by_python), f"{by_cel} against {by_python} for {json.dumps(changed)}"
            compared += 1
    assert compared > 5


def _mutations(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    values: list[Any] = [0, 7, "0", "External", "Session", {}, None]
    for path in _paths(document.get("spec", {})):
        for value in values:
            changed = json.loads(json.dumps(document))
            target = changed["spec"]
            for step in path[:-1]:
                target = target[step]
            if value is None:
                del target[path[-1]]
            else:
                target[path[-1]] = value
            yield changed


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for name, child in value.items():
            yield (*path, name)
            yield from _paths(child, (*path, name))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _paths(child, (*path, index))


def _for_jsonschema(node: dict[str, Any]) -> dict[str, Any]:
    """The schema as JSON Schema, where unknown fields are refused as `kubectl --validate=strict` does."""
    converted = {k: v for k, v in node.items() if not k.startswith("x-") and k not in ("description", "default")}
    if node.get("x-kubernetes-int-or-string"):
        converted["type"] = ["integer", "string"]
    if "properties" in node:
        converted["properties"] = {k: _for_jsonschema(v) for k, v in node["properties"].items()}
        converted["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        converted["additionalProperties"] = _for_jsonschema(node["additionalProperties"])
    if "items" in node:
        converted["items"] = _for_jsonschema(node["items"])
    return converted


_ENV = celpy.Environment()


@cache
def _program(rule: str) -> celpy.Runner:
    return _ENV.program(_ENV.compile(rule))


_UNKNOWN_TO_CELPY = ("isSorted", "oldSelf")


def _broken_rules(value: Any, schema: dict[str, Any]) -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if any(word in rule["rule"] for word in _UNKNOWN_TO_CELPY):
            continue
        if not _program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)}):
            yield rule["message"]
    if isinstance(value, dict):
        for name, child in schema.get("properties", {}).items():
            if name in value:
                yield from _broken_rules(value[name], child)
    elif isinstance(value, list):
        for item in value:
            yield from _broken_rules(item, schema["items"])


def test_every_rule_with_a_field_points_at_one_that_exists() -> None:
    def parts(kind: type[Part], seen: set[type[Part]]) -> Iterator[type[Part]]:
        if kind in seen:
            return
        seen.add(kind)
        yield kind
        from octavo_operator.api.schema import _submodel

        for name in kind.model_fields:
            child = _submodel(kind, name)
            if child is not None and issubclass(child, Part):
                yield from parts(child, seen)

    for definition in crd.DEFINITIONS:
        for part in parts(definition.kind, set()):
            names = {f.alias or n for n, f in part.model_fields.items()}
            for rule in part.rules:
                assert not rule.field or rule.field.split(".")[0] in names, (part, rule.field)
