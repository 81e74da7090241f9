"""The Open Inference Protocol over HTTP, with the real tritonclient."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from fakes.replica_process import replica_process

MODEL = "fake-model"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with replica_process() as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with triton.InferenceServerClient(url.removeprefix("http://")) as http:
        yield http


def inputs(text: str, *, binary: bool = True, **flags: bool) -> list[Any]:
    tensors = [triton.InferInput("text_input", [1], "BYTES")]
    tensors[0].set_data_from_numpy(np.array([text.encode()], dtype=np.object_), binary_data=binary)
    for name, value in flags.items():
        tensor = triton.InferInput(name, [1], "BOOL")
        tensor.set_data_from_numpy(np.array([value]), binary_data=binary)
        tensors.append(tensor)
    return tensors


def sampling(**values: Any) -> Any:
    tensor = triton.InferInput("sampling_parameters", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([json.dumps(values).encode()], dtype=np.object_))
    return tensor


def test_the_server_says_what_it_is(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata()["name"] == "octavo"
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]


def test_the_model_says_what_it_takes_and_gives(client: Any) -> None:
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("other")
    metadata = client.get_model_metadata(MODEL)
    assert metadata["inputs"][0] == {"name": "text_input", "datatype": "BYTES", "shape": [1]}
    config = client.get_model_config(MODEL, "1")
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["input"][0]["data_type"] == "TYPE_STRING"


@pytest.mark.parametrize("binary", [True, False])
def test_infer_gives_the_text_after_the_prompt(client: Any, binary: bool) -> None:
    outputs = [triton.InferRequestedOutput("text_output", binary_data=binary)]

    plain = client.infer(MODEL, inputs("Hi ", binary=binary), outputs=outputs, request_id="7")
    without = client.infer(MODEL, inputs("Hi ", exclude_input_in_output=True))

    assert plain.as_numpy("text_output")[0] == (b"Hi Hello from the f" if binary else "Hi Hello from the f")
    assert plain.get_response()["id"] == "7"
    assert without.as_numpy("text_output")[0] == b"Hello from the f"


def test_sampling_parameters_and_optional_outputs(client: Any) -> None:
    flags = dict.fromkeys(
        ("exclude_input_in_output", "return_finish_reason", "return_cumulative_logprob", "return_logprobs",
         "return_num_input_tokens", "return_num_output_tokens"), True,
    )  # fmt: skip

    result = client.infer(MODEL, [*inputs("abc", **flags), sampling(max_tokens=4, temperature=0)])

    assert result.as_numpy("text_output")[0] == b"Hell"
    assert result.as_numpy("finish_reason")[0] == b"length"
    assert result.as_numpy("num_input_tokens")[0] == 4
    assert result.as_numpy("num_output_tokens")[0] == 4
    assert result.as_numpy("cumulative_logprob")[0] == pytest.approx(-1.0)
    assert result.as_numpy("logprobs").tolist() == [-0.25] * 4


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_bodies_may_be_compressed_both_ways(client: Any, algorithm: str) -> None:
    result = client.infer(
        MODEL, inputs("Hi"), request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )

    assert result.as_numpy("text_output")[0].startswith(b"HiHello")


def test_repository_statistics_trace_and_logging(client: Any) -> None:
    before = client.get_inference_statistics(MODEL)["model_stats"][0]["inference_stats"]["success"]["count"]
    client.infer(MODEL, inputs("Hi"))
    statistics = client.get_inference_statistics()["model_stats"][0]

    assert statistics["inference_stats"]["success"]["count"] == before + 1
    assert client.get_model_repository_index() == [{"name": MODEL, "version": "1", "state": "READY", "reason": ""}]
    client.load_model(MODEL)
    with pytest.raises(InferenceServerException, match="scale down"):
        client.unload_model(MODEL)
    assert client.get_trace_settings(MODEL)["trace_level"] == ["OFF"]
    assert client.update_log_settings({"log_verbose_level": 1})["log_verbose_level"] == 1
    assert client.update_log_settings({"log_verbose_level": 0})["log_verbose_level"] == 0


def test_errors_are_plain_strings(client: Any, url: str) -> None:
    with pytest.raises(InferenceServerException, match="not served here"):
        client.infer("other", inputs("Hi"))
    with pytest.raises(InferenceServerException, match="text_input: missing"):
        client.infer(MODEL, inputs("Hi", stream=False)[1:])
    with pytest.raises(InferenceServerException, match="shared memory"):
        client.get_system_shared_memory_status()
    for body in (b"", b"{}", b'{"inputs": 3}', b'{"inputs": [{"name": "x", "datatype": "Q", "shape": [1]}]}'):
        answer = httpx2.post(f"{url}/v2/models/{MODEL}/infer", content=body)
        assert answer.status_code == 400
        assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize(
    ("tensor", "raw", "named"),
    [
        ({"name": "text_input", "datatype": "BYTES", "shape": [2]}, b"\x01\x00\x00\x00a", "exactly 2"),
        ({"name": "text_input", "datatype": "BYTES", "shape": [1]}, b"\xff\xff\xff\xffa", "cut short"),
        ({"name": "text_input", "datatype": "BYTES", "shape": [-1]}, b"", "negative"),
        ({"name": "text_input", "datatype": "BYTES", "shape": [2**40]}, b"", "elements"),
        ({"name": "text_input", "datatype": "INT64", "shape": [1]}, b"12345678", "must be BYTES"),
        ({"name": "text_input", "datatype": "BYTES", "shape": [1]}, b"\x02\x00\x00\x00\xff\xfe", "UTF-8"),
    ],
)
def test_hostile_tensors_are_refused(url: str, tensor: dict[str, Any], raw: bytes, named: str) -> None:
    header = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}]}).encode()

    answer = httpx2.post(
        f"{url}/v2/models/{MODEL}/infer", content=header + raw,
        headers={"inference-header-content-length": str(len(header))},
    )  # fmt: skip

    assert answer.status_code == 400
    assert named in answer.json()["error"]


def test_a_compression_bomb_is_refused(url: str) -> None:
    import zlib

    bomb = zlib.compress(b" " * (64 * 1024 * 1024), 9)

    answer = httpx2.post(f"{url}/v2/models/{MODEL}/infer", content=bomb, headers={"content-encoding": "deflate"})

    assert answer.status_code == 413


def test_generate_and_generate_stream(url: str) -> None:
    body = {"text_input": "Hi ", "id": "9", "parameters": {"max_tokens": 5, "temperature": 0}}

    whole = httpx2.post(f"{url}/v2/models/{MODEL}/generate", json=body).json()
    streamed = httpx2.post(f"{url}/v2/models/{MODEL}/versions/1/generate_stream", json=body).text
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.strip().split("\n\n")]

    assert whole == {"id": "9", "model_name": MODEL, "model_version": "1", "text_output": "Hi Hello"}
    assert "".join(event["text_output"] for event in events) == "Hello"
    assert {event["id"] for event in events} == {"9"}
