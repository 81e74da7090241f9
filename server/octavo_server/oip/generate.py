"""Triton's generate extension: the tensors of a text model as flat JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from octavo_server.errors import bad_request
from octavo_server.oip.models import VERSION, InferRequest, InferResponse
from octavo_server.oip.sampling import REFUSED, TritonSampling
from octavo_server.oip.tensors import Tensor, TensorSpec, tensor_from_values
from octavo_server.parsing import json_object, parse

_OWN_FIELDS = ("id", "parameters", "model_name", "model_version")
_SAMPLING_FIELDS = frozenset({*TritonSampling.__struct_fields__, *REFUSED})


class GenerateBody(msgspec.Struct, frozen=True):
    """Checked here; the other top-level keys are inputs or parameters by name."""

    text_input: str
    id: str = ""
    parameters: dict[str, Any] = {}
    stream: bool | None = None


def generate_request(body: bytes, inputs: Sequence[TensorSpec], *, stream: bool) -> InferRequest:
    """Keys and parameters that name an input become its tensor, those that name a sampling field are collected."""
    declared = parse(body, GenerateBody).request
    values: dict[str, Any] = {**declared.parameters, **json_object(body)}
    for name in _OWN_FIELDS:
        values.pop(name, None)
    values["stream"] = (declared.stream is not False) and stream
    specs = {spec.name: spec for spec in inputs}
    sampling = values.get("sampling_parameters")
    collected = json.loads(sampling) if isinstance(sampling, str) and _is_object(sampling) else sampling or {}
    if not isinstance(collected, dict):
        raise bad_request("sampling_parameters: must be a JSON object or its text", "sampling_parameters")
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        if name in specs and name != "sampling_parameters":
            tensors[name] = tensor_from_values(name, specs[name].datatype, (1,), value)
        elif name in _SAMPLING_FIELDS:
            collected[name] = value
    if "sampling_parameters" in specs:
        tensors["sampling_parameters"] = Tensor.of_bytes("sampling_parameters", [json.dumps(collected).encode()])
    return InferRequest(declared.id, {name: tensor for name, tensor in tensors.items() if name in specs})


def generate_response(model: str, request_id: str, response: InferResponse) -> dict[str, Any]:
    """One value per output, lists only where there are several."""
    body: dict[str, Any] = {"model_name": model, "model_version": VERSION}
    if request_id:
        body["id"] = request_id
    for tensor in response.outputs:
        values = tensor.json_data()
        body[tensor.name] = values[0] if len(values) == 1 else values
    return body


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
