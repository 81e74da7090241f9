"""From a typed model to a structural OpenAPI v3 schema as CustomResourceDefinitions want it."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

from octavo_operator.api.base import Part

_KEPT = (
    "type",
    "format",
    "description",
    "default",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "x-kubernetes-int-or-string",
    "x-kubernetes-preserve-unknown-fields",
)


def structural_schema(kind: type[Part]) -> dict[str, Any]:
    """The schema of a kind, its references resolved, with defaults and validation rules in place."""
    document = kind.model_json_schema(by_alias=True, mode="validation")
    schema = _convert(document, document.get("$defs", {}), kind)
    properties = schema["properties"]
    properties["apiVersion"] = {"type": "string"}
    properties["kind"] = {"type": "string"}
    properties["metadata"] = {"type": "object"}
    schema["required"] = ["spec"]
    if "status" in properties:
        _without_defaults(properties["status"])
    return schema


def _without_defaults(schema: dict[str, Any]) -> None:
    """What is observed has no defaults: an absent field says that nothing was seen yet."""
    schema.pop("default", None)
    for child in schema.get("properties", {}).values():
        _without_defaults(child)
    if isinstance(schema.get("items"), dict):
        _without_defaults(schema["items"])


def _convert(node: dict[str, Any], definitions: dict[str, Any], model: type[BaseModel] | None) -> dict[str, Any]:
    node = _resolve(node, definitions)
    schema = {key: node[key] for key in _KEPT if key in node}
    if "description" in schema:
        schema["description"] = " ".join(schema["description"].split())
    if node.get("type") == "object" and "properties" in node:
        schema["properties"] = {
            name: _convert(child, definitions, _submodel(model, name)) for name, child in node["properties"].items()
        }
        if required := node.get("required"):
            schema["required"] = sorted(required)
        if rules := _validations(model):
            schema["x-kubernetes-validations"] = rules
    elif node.get("type") == "object" and isinstance(node.get("additionalProperties"), dict):
        schema["additionalProperties"] = _convert(node["additionalProperties"], definitions, None)
    elif node.get("type") == "array":
        schema["items"] = _convert(node["items"], definitions, model)
        if keys := node.get("x-list-map-keys"):
            schema["x-kubernetes-list-type"] = "map"
            schema["x-kubernetes-list-map-keys"] = keys
        elif list_type := node.get("x-list-type"):
            schema["x-kubernetes-list-type"] = list_type
    _simplify_default(schema, model)
    return schema


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The node with `$ref`, `allOf` of one and `anyOf` with null taken away; its own keywords win."""
    own = {k: v for k, v in node.items() if k not in ("$ref", "allOf", "anyOf")}
    base: dict[str, Any] = {}
    if "$ref" in node:
        base = definitions[node["$ref"].rsplit("/", 1)[1]]
    elif "anyOf" in node:
        (base,) = [branch for branch in node["anyOf"] if branch.get("type") != "null"]
    elif "allOf" in node:
        (base,) = node["allOf"]
    return {**_resolve(base, definitions), **own} if base else own


def _simplify_default(schema: dict[str, Any], model: type[BaseModel] | None) -> None:
    """A default object is `{}`, since its fields have defaults of their own; null is no default.

    Rules are the exception: the API server checks them against the default as it is written.
    """
    default = schema.get("default")
    if default is None:
        schema.pop("default", None)
    elif isinstance(default, dict):
        if "properties" not in schema:
            schema.pop("default")
        elif _has_rules(model):
            schema["default"] = _without_nulls(default)
        else:
            schema["default"] = {}


def _has_rules(model: type[BaseModel] | None) -> bool:
    return model is not None and issubclass(model, Part) and any(rule.cel for rule in model.rules)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _validations(model: type[BaseModel] | None) -> list[dict[str, str]]:
    if model is None or not issubclass(model, Part):
        return []
    rules = []
    for rule in model.rules:
        if rule.cel is None:
            continue
        entry = {"rule": rule.cel, "message": rule.message}
        if rule.field and rule.field.split(".")[0] != "metadata" and _may_point_at(model, rule.field):
            entry["fieldPath"] = "." + rule.field
        rules.append(entry)
    return rules


def _may_point_at(model: type[BaseModel], path: str) -> bool:
    """Whether every step of the path is a field, as `fieldPath` demands."""
    current: type[BaseModel] | None = model
    for name in path.split("."):
        if current is None or name not in {f.alias or n for n, f in current.model_fields.items()}:
            return False
        current = _submodel(current, name)
    return True


def _submodel(model: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    if model is None:
        return None
    annotation = next((f.annotation for n, f in model.model_fields.items() if name in (f.alias, n)), None)
    return _first_model(annotation)


def _first_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := _first_model(arg))), None)
