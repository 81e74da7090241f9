"""Parse a resource: the schema first, then every rule; all errors at once, each with its field path."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from octavo_operator.api.base import API_VERSION, GROUP, Part
from octavo_operator.api.errors import FieldError, ManifestErrors
from octavo_operator.api.inference_service import InferenceService
from octavo_operator.api.inference_tenant import InferenceTenant
from octavo_operator.api.model_cache import ModelCache
from octavo_operator.api.quantity import QUANTITY_PATTERN
from octavo_operator.api.serving_runtime import ClusterServingRuntime, ServingRuntime

Resource = InferenceService | ServingRuntime | ClusterServingRuntime | ModelCache | InferenceTenant
KINDS: dict[str, type[Part]] = {kind.__name__: kind for kind in get_args(Resource)}

_R = TypeVar("_R", bound=Part)
MAX_SHOWN_VALUE = 80


def parse_resource(document: Any, *, local: bool = False) -> Resource:
    """The typed resource of one document. Raises `ManifestErrors`; `local` allows what only local mode can do."""
    errors = _header_errors(document)
    if errors:
        raise ManifestErrors(errors)
    return parse(KINDS[document["kind"]], document, local=local)  # type: ignore[return-value]


def parse(kind: type[_R], document: Mapping[str, Any], *, local: bool = False) -> _R:
    """A document as this kind of part. Raises `ManifestErrors` with everything that is wrong."""
    try:
        part = kind.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        details = error.errors(include_url=False)
        by_path = {error.path: error for error in (_field_error(kind, d) for d in details)}
        raise ManifestErrors(sorted(by_path.values())) from error
    errors = list(broken_rules(part, local=local))
    if errors:
        raise ManifestErrors(errors)
    return part


def broken_rules(part: Part, *, local: bool = False, path: str = "") -> Iterator[FieldError]:
    """Errors of every rule that the part, or a part of it, breaks."""
    for rule in part.rules:
        if rule.holds is None or (local and rule.cluster_only) or rule.holds(part):
            continue
        yield FieldError(_join(path, rule.field), rule.message, _shown(_value_at(part, rule.field)))
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        below = _join(path, field.alias or name)
        if isinstance(value, Part):
            yield from broken_rules(value, local=local, path=below)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Part):
                    yield from broken_rules(item, local=local, path=f"{below}[{index}]")


def _header_errors(document: Any) -> list[FieldError]:
    if not isinstance(document, dict):
        return [
            FieldError("", "a manifest must be a mapping with apiVersion, kind, metadata and spec", _shown(document))
        ]
    errors = []
    kind, version = document.get("kind"), document.get("apiVersion")
    if not isinstance(kind, str) or kind not in KINDS:
        close = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"must be one of {', '.join(KINDS)}"
        errors.append(FieldError("kind", hint, _shown(kind)))
    if version != API_VERSION:
        known = isinstance(version, str) and version.startswith(f"{GROUP}/")
        hint = f"this version of Octavo serves {API_VERSION}" if known else f"must be {API_VERSION}"
        errors.append(FieldError("apiVersion", hint, _shown(version)))
    return errors


def _field_error(kind: type[BaseModel], detail: ErrorDetails) -> FieldError:
    location = [part for part in detail["loc"] if not _is_union_branch(part)]
    path = ""
    for part in location:
        path = f"{path}[{part}]" if isinstance(part, int) else _join(path, part)
    message = _message(kind, detail, location)
    missing = detail["type"] == "missing"
    return FieldError(path, message, "" if missing else _shown(detail.get("input")))


def _message(kind: type[BaseModel], detail: ErrorDetails, location: list[int | str]) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return "is required"
        case "extra_forbidden":
            return _unknown_field(kind, location)
        case "enum" | "literal_error":
            return f"must be {context['expected']}"
        case "string_type":
            return 'must be a string; write it in quotes, such as "0.75"'
        case "string_pattern_mismatch" if context["pattern"] == QUANTITY_PATTERN:
            return 'must be a quantity such as 8, "500m" or "16Gi"'
        case "string_pattern_mismatch":
            return f"must match {context['pattern']}"
        case "int_type" | "int_from_float":
            return "must be a whole number"
        case "bool_type":
            return "must be true or false"
        case "list_type":
            return "must be a list"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a mapping"
        case _:
            text = detail["msg"]
            return text[0].lower() + text[1:]


def _unknown_field(kind: type[BaseModel], location: list[int | str]) -> str:
    known = _field_names(_model_at(kind, location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.6)
    if close:
        return f"unknown field; did you mean {close[0]}?"
    return f"unknown field; allowed: {', '.join(sorted(known))}" if known else "unknown field"


def _field_names(model: type[BaseModel] | None) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _model_at(kind: type[BaseModel], location: list[int | str]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = kind
    for part in location:
        if isinstance(part, int) or model is None:
            continue
        annotation = next((f.annotation for n, f in model.model_fields.items() if part in (f.alias, n)), None)
        model = _model_within(annotation)
    return model


def _model_within(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := _model_within(arg))), None)


def _is_union_branch(part: int | str) -> bool:
    """Pydantic names the branch of a union it tried, such as `constrained-str`; that is no field."""
    return isinstance(part, str) and (part in ("int", "str") or part.startswith(("constrained-", "function-")))


def _value_at(part: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        if not isinstance(part, BaseModel):
            return None
        attribute = next((n for n, f in type(part).model_fields.items() if f.alias == name), name)
        part = getattr(part, attribute, None)
    return None if isinstance(part, BaseModel | list) else part


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def _shown(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = text[:MAX_SHOWN_VALUE] + ("…" if len(text) > MAX_SHOWN_VALUE else "")
    return repr(shown) if isinstance(value, str) else shown
