"""ONNX models beside the engine's own, with the real tritonclient."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from fakes.onnx_files import WEIGHTS, write_identity_of_strings, write_linear
from fakes.replica_process import free_port, replica_process
from octavo_engine.errors import ModelLoadError
from octavo_server.oip.model_files import find_models
from octavo_server.oip.onnx_model import OnnxProgram


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    write_linear(folder / "linear", 1)
    write_linear(folder / "linear", 3, scale=10.0)
    write_linear(folder / "fixed", rows=2)
    write_identity_of_strings(folder / "strings")
    return folder


@pytest.fixture(scope="module")
def addresses(repository: Path) -> Iterator[tuple[str, str]]:
    port = free_port()
    with replica_process(grpc_port=port, model_repository=str(repository)) as url:
        yield url.removeprefix("http://"), f"127.0.0.1:{port}"


@pytest.fixture
def client(addresses: tuple[str, str]) -> Iterator[Any]:
    with triton.InferenceServerClient(addresses[0]) as http:
        yield http


def matrix(kind: Any, values: np.ndarray[Any, Any]) -> list[Any]:
    tensor = kind.InferInput("x", list(values.shape), "FP32")
    tensor.set_data_from_numpy(values)
    return [tensor]


def test_the_newest_version_answers_over_http_and_grpc(client: Any, addresses: tuple[str, str]) -> None:
    values = np.array([[1, 0, 0], [0, 1, 1]], dtype=np.float32)

    over_http = client.infer("linear", matrix(triton, values))
    with triton_grpc.InferenceServerClient(addresses[1]) as grpc_client:
        over_grpc = grpc_client.infer("linear", matrix(triton_grpc, values), model_version="3")

    np.testing.assert_allclose(over_http.as_numpy("y"), values @ WEIGHTS * 10)
    np.testing.assert_allclose(over_grpc.as_numpy("y"), values @ WEIGHTS * 10)
    assert over_grpc.get_response().model_version == "3"


def test_it_describes_itself(client: Any) -> None:
    metadata = client.get_model_metadata("linear")
    assert metadata["platform"] == "onnxruntime_onnx"
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert metadata["versions"] == ["3"]
    assert client.get_model_config("linear")["model_transaction_policy"] == {"decoupled": False}
    assert {entry["name"] for entry in client.get_model_repository_index()} == {
        "fake-model", "linear", "fixed", "strings"
    }  # fmt: skip


def test_strings_go_in_and_out(client: Any) -> None:
    tensor = triton.InferInput("x", [2], "BYTES")
    tensor.set_data_from_numpy(np.array(["grün".encode(), b""], dtype=np.object_))

    assert client.infer("strings", [tensor]).as_numpy("y").tolist() == ["grün".encode(), b""]


async def test_requests_that_arrive_together_share_calls(addresses: tuple[str, str]) -> None:
    async with triton_aio.InferenceServerClient(addresses[0], conn_limit=64) as client:
        before = (await client.get_inference_statistics("linear"))["model_stats"][0]
        values = [np.full((1, 3), i, dtype=np.float32) for i in range(48)]
        results = await asyncio.gather(*(client.infer("linear", matrix(triton, value)) for value in values))
        after = (await client.get_inference_statistics("linear"))["model_stats"][0]

    for value, result in zip(values, results, strict=True):
        np.testing.assert_allclose(result.as_numpy("y"), value @ WEIGHTS * 10)
    assert after["inference_count"] - before["inference_count"] == 48
    assert after["execution_count"] - before["execution_count"] < 48


def test_unload_frees_and_load_brings_back(client: Any) -> None:
    client.unload_model("strings")
    assert not client.is_model_ready("strings")
    with pytest.raises(InferenceServerException, match="not served"):
        client.get_model_metadata("strings")

    client.load_model("strings")

    assert client.is_model_ready("strings")
    with pytest.raises(InferenceServerException):
        client.load_model("../strings")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"inputs": []}, "x: missing"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}, "shape [-1, 3]"),
        ({"inputs": [{"name": "x", "datatype": "FP64", "shape": [1, 3], "data": [1, 2, 3]}]}, "must be FP32"),
        ({"inputs": [{"name": "q", "datatype": "FP32", "shape": [1], "data": [1]}]}, "q: unknown"),
        ({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}],
          "outputs": [{"name": "z"}]}, "z: unknown"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_named(addresses: tuple[str, str], body: dict[str, Any], named: str) -> None:
    answer = httpx2.post(f"http://{addresses[0]}/v2/models/linear/infer", json=body)

    assert answer.status_code == 400
    assert named in answer.json()["error"]


def test_a_model_of_fixed_shape_is_not_batched(client: Any) -> None:
    values = np.ones((2, 3), dtype=np.float32)

    np.testing.assert_allclose(client.infer("fixed", matrix(triton, values)).as_numpy("y"), values @ WEIGHTS)


def test_only_what_lies_in_the_folder_is_found(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "1").symlink_to(repository / "linear" / "1")
    (tmp_path / ".hidden").mkdir()
    write_linear(tmp_path / "good", 2)

    assert list(find_models(tmp_path)) == ["good"]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x09" * 1_000])
def test_a_broken_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)

    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        OnnxProgram(file)
