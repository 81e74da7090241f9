"""The Open Inference Protocol over gRPC, with the real tritonclient (blocking and asyncio), health and reflection."""

from __future__ import annotations

import asyncio
import json
import queue
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import httpx2
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

from fakes.replica_process import free_port, replica_process

MODEL = "fake-model"


@pytest.fixture(scope="module")
def addresses() -> Iterator[tuple[str, str]]:
    """(HTTP, gRPC)."""
    port = free_port()
    with replica_process({"step_s": 0.002}, grpc_port=port) as url:
        yield url, f"127.0.0.1:{port}"


@pytest.fixture
def client(addresses: tuple[str, str]) -> Iterator[Any]:
    with triton.InferenceServerClient(addresses[1]) as grpc_client:
        yield grpc_client


def inputs(text: str, *, stream: bool = False, **sampling: Any) -> list[Any]:
    values = {
        "text_input": np.array([text.encode()], dtype=np.object_),
        "stream": np.array([stream]),
        "exclude_input_in_output": np.array([True]),
        "sampling_parameters": np.array([json.dumps(sampling).encode()], dtype=np.object_),
    }
    tensors = []
    for name, value in values.items():
        tensor = triton.InferInput(name, [1], "BOOL" if value.dtype == np.bool_ else "BYTES")
        tensor.set_data_from_numpy(value)
        tensors.append(tensor)
    return tensors


def test_the_server_and_model_describe_themselves(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata().name == "octavo"
    assert client.get_model_metadata(MODEL).inputs[0].name == "text_input"
    assert client.get_model_config(MODEL).config.model_transaction_policy.decoupled
    assert client.get_model_repository_index().models[0].state == "READY"
    client.load_model(MODEL)
    with pytest.raises(InferenceServerException, match="scale down"):
        client.unload_model(MODEL)
    assert list(client.get_trace_settings(MODEL).settings["trace_level"].value) == ["OFF"]
    assert client.update_log_settings({"log_info": True}).settings["log_info"].bool_param


def test_infer_and_statistics(client: Any) -> None:
    result = client.infer(MODEL, inputs("Hi", max_tokens=5), request_id="3")

    assert result.as_numpy("text_output")[0] == b"Hello"
    assert result.get_response().id == "3"
    assert client.get_inference_statistics(MODEL).model_stats[0].inference_stats.success.count >= 1


def test_errors_carry_a_status(client: Any) -> None:
    with pytest.raises(InferenceServerException) as missing:
        client.infer("other", inputs("Hi"))
    with pytest.raises(InferenceServerException) as wrong:
        client.infer(MODEL, inputs("Hi", temperature=9))

    assert missing.value.status() == "StatusCode.NOT_FOUND"
    assert wrong.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert "temperature" in wrong.value.message()


def test_many_requests_share_a_stream_and_an_error_is_one_requests_own(client: Any) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))

    for request_id in ("a", "b"):
        client.async_stream_infer(
            MODEL, inputs("Hi", stream=True, max_tokens=5), request_id=request_id,
            enable_empty_final_response=True,
        )  # fmt: skip
    client.async_stream_infer(MODEL, inputs("Hi", stream=True, temperature=9), request_id="bad")
    texts, finals, errors = {"a": b"", "b": b""}, [], []
    while len(finals) < 2 or not errors:
        result, error = answers.get(timeout=10)
        if error is not None:
            errors.append(error)
            continue
        response = result.get_response()
        if response.parameters["triton_final_response"].bool_param:
            finals.append(response.id)
            assert not response.outputs
        else:
            texts[response.id] += result.as_numpy("text_output")[0]
    client.stop_stream()

    assert texts == {"a": b"Hello", "b": b"Hello"}
    assert sorted(finals) == ["a", "b"]
    assert "temperature" in str(errors[0])


def test_half_close_finishes_what_is_pending(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put(result))
    client.async_stream_infer(MODEL, inputs("Hi", max_tokens=20))

    client.stop_stream()

    assert answers.get(timeout=1).as_numpy("text_output")[0] == b"Hello from the fake "


def test_cancelling_the_stream_ends_its_sequences(addresses: tuple[str, str]) -> None:
    def running() -> float:
        lines = httpx2.get(f"{addresses[0]}/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith("octavo_requests_running")).rsplit(" ", 1)[1])

    answers: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(addresses[1]) as client:
        client.start_stream(callback=lambda result, error: answers.put(result))
        client.async_stream_infer(MODEL, inputs("Hi", stream=True, max_tokens=3_000, ignore_eos=True))
        answers.get(timeout=10)
        assert running() == 1
        client.stop_stream(cancel_requests=True)

    deadline = asyncio.new_event_loop().time() + 5
    while running() != 0:
        assert asyncio.new_event_loop().time() < deadline


async def test_the_asyncio_client_streams_too(addresses: tuple[str, str]) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": MODEL, "inputs": inputs("Hi", stream=True, max_tokens=5), "request_id": "1"}

    async with triton_aio.InferenceServerClient(addresses[1]) as client:
        pieces = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            pieces.append(result.as_numpy("text_output")[0])

    assert b"".join(pieces) == b"Hello"


def test_health_and_reflection(addresses: tuple[str, str]) -> None:
    with grpc.insecure_channel(addresses[1]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        status = health.Check(health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        assert next(iter(health.Watch(health_pb2.HealthCheckRequest()))).status == status
        with pytest.raises(grpc.RpcError) as unknown:
            health.Check(health_pb2.HealthCheckRequest(service="other"))
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= set(services)
