"""Between gRPC messages and the neutral requests, responses and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo_server.errors import bad_request
from octavo_server.limits import LIMITS
from octavo_server.oip import open_inference_pb2 as pb
from octavo_server.oip.models import InferRequest, InferResponse, ParameterValue
from octavo_server.oip.tensors import Tensor, checked_count, tensor_from_raw, tensor_from_values

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def decode_request(message: pb.ModelInferRequest) -> InferRequest:
    """Inputs may be raw or typed, not both; raises a 400 naming the tensor at fault."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise bad_request(f"raw_input_contents: {len(raw)} entries for {len(message.inputs)} inputs", "inputs")
    inputs: dict[str, Tensor] = {}
    for position, declared in enumerate(message.inputs):
        if declared.name in inputs:
            raise bad_request(f"inputs.{declared.name[:40]}: given twice", declared.name[:40])
        shape = list(declared.shape)
        if raw:
            inputs[declared.name] = tensor_from_raw(declared.name, declared.datatype, shape, raw[position])
        else:
            inputs[declared.name] = _from_contents(declared, shape)
    return InferRequest(
        message.id, inputs, decode_parameters(message.parameters), tuple(output.name for output in message.outputs)
    )


def decode_parameters(parameters: Mapping[str, Any]) -> dict[str, ParameterValue]:
    """Values of the one-of, whichever is set."""
    if len(parameters) > LIMITS.metadata_entries:
        raise bad_request(f"parameters: at most {LIMITS.metadata_entries}, got {len(parameters)}", "parameters")
    decoded: dict[str, ParameterValue] = {}
    for name, parameter in parameters.items():
        chosen = parameter.WhichOneof("parameter_choice")
        if chosen is not None:
            decoded[name] = getattr(parameter, chosen)
    return decoded


def encode_response(
    model: str, version: str, request_id: str, response: InferResponse, *, tell_final: bool = False
) -> pb.ModelInferResponse:
    """Outputs always raw: clients read nothing else. `tell_final` adds `triton_final_response`."""
    message = pb.ModelInferResponse(model_name=model, model_version=version, id=request_id)
    if tell_final:
        message.parameters["triton_final_response"].bool_param = response.final
    for tensor in response.outputs:
        message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_output_contents.append(tensor.data)
    return message


def encode_metadata(metadata: Mapping[str, Any]) -> pb.ModelMetadataResponse:
    """From the HTTP shape."""
    return pb.ModelMetadataResponse(**metadata)


def encode_config(config: Mapping[str, Any]) -> pb.ModelConfig:
    """From the HTTP shape; datatypes are enum members here."""

    def tensors(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**entry, "data_type": pb.DataType.Value(entry["data_type"])} for entry in entries]

    return pb.ModelConfig(**{**config, "input": tensors(config["input"]), "output": tensors(config["output"])})


def encode_statistics(statistics: Mapping[str, Any]) -> pb.ModelStatistics:
    """From the HTTP shape, without the lists that are always empty."""
    kept = {name: value for name, value in statistics.items() if name not in ("response_stats", "batch_stats")}
    return pb.ModelStatistics(**kept)


def _from_contents(declared: Any, shape: list[int]) -> Tensor:
    checked_count(declared.name, declared.datatype, shape)
    contents = _CONTENTS.get(declared.datatype)
    if contents is None:
        raise bad_request(f"inputs.{declared.name}: {declared.datatype} is only taken raw", declared.name)
    return tensor_from_values(declared.name, declared.datatype, shape, list(getattr(declared.contents, contents)))
