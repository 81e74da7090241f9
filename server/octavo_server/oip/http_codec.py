"""Bodies of v2 inference over HTTP: JSON, optionally followed by raw tensors, optionally compressed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from octavo_server.errors import ApiError, bad_request
from octavo_server.limits import LIMITS
from octavo_server.oip.models import InferRequest, ParameterValue
from octavo_server.oip.tensors import Tensor, checked_count, tensor_from_raw, tensor_from_values
from octavo_server.parsing import parse

HEADER_LENGTH = "inference-header-content-length"
BINARY_SIZE = "binary_data_size"
BINARY_DATA = "binary_data"


class InputTensor(msgspec.Struct, frozen=True):
    """An input as JSON declares it."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class OutputRequest(msgspec.Struct, frozen=True):
    """An output that is wanted."""

    name: str
    parameters: dict[str, Any] = {}


class InferBody(msgspec.Struct, frozen=True):
    """The JSON of an inference request."""

    inputs: list[InputTensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[OutputRequest] | None = None


class DecodedRequest(msgspec.Struct, frozen=True):
    """A request, and which of its outputs shall be binary (None: all, or none, by `binary_default`)."""

    request: InferRequest
    binary_outputs: Mapping[str, bool]
    binary_default: bool


def decompress(body: bytes, encoding: str | None) -> bytes:
    """Undo Content-Encoding gzip or deflate, bounded; raises a 400 or 413."""
    if encoding in (None, "", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise bad_request(
            f"Content-Encoding: must be gzip or deflate, got {(encoding or '')[:20]!r}", "Content-Encoding"
        )
    decoder = zlib.decompressobj(31 if encoding == "gzip" else 15)
    try:
        plain = decoder.decompress(body, LIMITS.body_bytes)
    except zlib.error:
        raise bad_request(f"The body is not valid {encoding}.", "Content-Encoding") from None
    if decoder.unconsumed_tail:
        raise ApiError(413, f"The body expands beyond {LIMITS.body_bytes} bytes.", reason="body_too_large")
    return plain


def compress(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """The body in an encoding the caller accepts, and its name."""
    if "gzip" in accepted:
        encoder = zlib.compressobj(wbits=31)
        return encoder.compress(body) + encoder.flush(), "gzip"
    if "deflate" in accepted:
        return zlib.compress(body), "deflate"
    return body, None


def decode_request(body: bytes, header_length: str | None) -> DecodedRequest:
    """Read JSON and the raw tensors behind it; raises a 400 naming the tensor at fault."""
    if header_length is None:
        header, raw = body, b""
    else:
        if not header_length.isdigit() or not 0 < int(header_length) <= len(body):
            raise bad_request(f"{HEADER_LENGTH}: must be between 1 and the body's {len(body)} bytes", HEADER_LENGTH)
        header, raw = body[: int(header_length)], body[int(header_length) :]
    declared = parse(header, InferBody).request
    inputs: dict[str, Tensor] = {}
    for tensor in declared.inputs:
        if tensor.name in inputs:
            raise bad_request(f"inputs.{tensor.name[:40]}: given twice", tensor.name[:40])
        inputs[tensor.name], raw = _read_input(tensor, raw)
    if raw:
        raise bad_request(f"The body holds {len(raw)} bytes more than its inputs declare.")
    outputs = declared.outputs or []
    request = InferRequest(
        declared.id, inputs, _parameters(declared.parameters), tuple(output.name for output in outputs)
    )
    default = bool(declared.parameters.get("binary_data_output", False))
    binary = {output.name: bool(output.parameters.get(BINARY_DATA, default)) for output in outputs}
    return DecodedRequest(request, binary, default)


def encode_response(
    model: str, version: str, decoded: DecodedRequest, tensors: Sequence[Tensor]
) -> tuple[bytes, int | None]:
    """JSON and the raw tensors behind it, and the JSON's length when there are any."""
    outputs: list[dict[str, Any]] = []
    raw: list[bytes] = []
    for tensor in tensors:
        output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if decoded.binary_outputs.get(tensor.name, decoded.binary_default):
            output["parameters"] = {BINARY_SIZE: len(tensor.data)}
            raw.append(tensor.data)
        else:
            output["data"] = tensor.json_data()
        outputs.append(output)
    body: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": outputs}
    if decoded.request.id:
        body["id"] = decoded.request.id
    header = json.dumps(body).encode()
    return header + b"".join(raw), len(header) if raw else None


def _read_input(tensor: InputTensor, raw: bytes) -> tuple[Tensor, bytes]:
    size = tensor.parameters.get(BINARY_SIZE)
    if size is None:
        return tensor_from_values(tensor.name, tensor.datatype, tensor.shape, tensor.data or []), raw
    checked_count(tensor.name, tensor.datatype, tensor.shape)
    if not isinstance(size, int) or not 0 <= size <= len(raw):
        raise bad_request(f"inputs.{tensor.name}: {BINARY_SIZE} goes beyond the body", tensor.name)
    return tensor_from_raw(tensor.name, tensor.datatype, tensor.shape, raw[:size]), raw[size:]


def _parameters(values: Mapping[str, Any]) -> dict[str, ParameterValue]:
    if len(values) > LIMITS.metadata_entries:
        raise bad_request(f"parameters: at most {LIMITS.metadata_entries}, got {len(values)}", "parameters")
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
