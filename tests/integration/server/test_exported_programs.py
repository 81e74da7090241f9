"""Programs of torch.export beside the engine's model: the same numbers as torch, and nothing of a file is executed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from torch.export import Dim, export, save

from fakes.replica_process import free_port, replica_process
from octavo_engine.errors import ModelLoadError
from octavo_server.caller import Caller
from octavo_server.oip.array_model import ArrayModel
from octavo_server.oip.exported_program import ExportedProgram
from octavo_server.oip.model_files import find_models, warn_of_pickles
from octavo_server.oip.models import InferRequest
from octavo_server.oip.tensors import Tensor


class Classifier(torch.nn.Module):
    """A bit of everything that small models hold: a table, a convolution, statistics, a constant, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(10, 3)
        self.convolution = torch.nn.Conv1d(3, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm1d(4)
        self.recurrent = torch.nn.Linear(4, 4)
        self.dropout = torch.nn.Dropout()
        self.scale = torch.tensor([2.0])

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.dropout(self.norm(self.convolution(self.table(ids).transpose(1, 2))))
        first, second = x.chunk(2, 1)
        pooled = torch.cat([second, first], 1).mean(-1) * self.scale
        scores = torch.softmax(self.recurrent(pooled).to(torch.float64), -1)
        return scores, (ids > 0).sum(-1)


class Product(torch.nn.Module):
    """Two inputs of any length, reshaped by sizes computed on the way."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        joined = torch.stack([left, right], 1)
        return joined.reshape(left.shape[0], 2 * left.shape[1]).sum(-1, keepdim=True) + left.shape[1]


IDS = torch.tensor([[1, 2, 0, 4, 9], [0, 0, 3, 3, 3]])


def write(path: Path, model: torch.nn.Module, arguments: tuple[Any, ...], shapes: Any) -> torch.nn.Module:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(export(model.eval(), arguments, dynamic_shapes=shapes), path)
    return model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("exported") / "classifier" / "2" / "model.pt2"
    write(file, Classifier(), (IDS,), ({0: Dim("batch", min=1, max=16)},))
    return file


@pytest.fixture(scope="module")
def addresses(classifier: Path) -> Iterator[tuple[str, str]]:
    port = free_port()
    with replica_process(grpc_port=port, model_repository=str(classifier.parents[2])) as url:
        yield url.removeprefix("http://"), f"127.0.0.1:{port}"


def tensor_of(kind: Any, ids: torch.Tensor) -> list[Any]:
    tensor = kind.InferInput("ids", list(ids.shape), "INT64")
    tensor.set_data_from_numpy(ids.numpy())
    return [tensor]


def expected(ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        scores, counts = Classifier().eval()(ids)
    return scores.numpy(), counts.numpy()


def test_both_transports_give_what_torch_gives(addresses: tuple[str, str]) -> None:
    scores, counts = expected(IDS)

    with triton.InferenceServerClient(addresses[0]) as client:
        over_http = client.infer("classifier", tensor_of(triton, IDS))
        metadata = client.get_model_metadata("classifier")
    with triton_grpc.InferenceServerClient(addresses[1]) as client:
        over_grpc = client.infer("classifier", tensor_of(triton_grpc, IDS))

    for answer in (over_http, over_grpc):
        np.testing.assert_allclose(answer.as_numpy("OUTPUT__0"), scores, rtol=1e-12)
        np.testing.assert_array_equal(answer.as_numpy("OUTPUT__1"), counts)
    assert metadata["platform"] == "pytorch_exported_program"
    assert metadata["inputs"] == [{"name": "ids", "datatype": "INT64", "shape": [-1, 5]}]
    assert [output["datatype"] for output in metadata["outputs"]] == ["FP64", "INT64"]
    assert metadata["versions"] == ["2"]


async def test_requests_that_arrive_together_share_calls_and_one_that_fails_fails_alone(
    addresses: tuple[str, str],
) -> None:
    async with triton_aio.InferenceServerClient(addresses[0], conn_limit=64) as client:
        before = (await client.get_inference_statistics("classifier"))["model_stats"][0]
        rows = [torch.randint(0, 10, (1, 5)) for _ in range(30)]
        wrong = torch.full((1, 5), 99)  # no such row in the table
        results = await asyncio.gather(
            *(client.infer("classifier", tensor_of(triton, row)) for row in rows),
            client.infer("classifier", tensor_of(triton, wrong)),
            return_exceptions=True,
        )
        after = (await client.get_inference_statistics("classifier"))["model_stats"][0]

    for row, result in zip(rows, results[:30], strict=True):
        np.testing.assert_allclose(result.as_numpy("OUTPUT__0"), expected(row)[0], rtol=1e-6)
    assert "of these shapes or values" in str(results[-1])
    assert after["inference_count"] - before["inference_count"] == 30


def test_wrong_shapes_are_named(addresses: tuple[str, str]) -> None:
    body = {"inputs": [{"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}]}
    answer = httpx2.post(f"http://{addresses[0]}/v2/models/classifier/infer", json=body)

    assert answer.status_code == 400
    assert "shape [-1, 5]" in answer.json()["error"]


def test_sizes_are_computed_on_the_way(tmp_path: Path) -> None:
    rows, columns = Dim("rows"), Dim("columns")
    shapes = ({0: rows, 1: columns}, {0: rows, 1: columns})
    model = write(tmp_path / "model.pt2", Product(), (torch.ones(2, 3), torch.ones(2, 3)), shapes)
    program = ExportedProgram(tmp_path / "model.pt2")

    for shape in ((1, 2), (4, 7)):
        left, right = torch.randn(shape), torch.randn(shape)
        (found,) = program.run({"left": left.numpy(), "right": right.numpy()})
        np.testing.assert_allclose(found, model(left, right).numpy(), rtol=1e-6)


class Keeper(torch.nn.Module):
    def __init__(self, through_a_view: bool) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2, 1))
        self.through_a_view = through_a_view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (self.count.view(-1)[:1] if self.through_a_view else self.count).add_(1)
        return x.relu_() + self.count


@pytest.mark.parametrize("through_a_view", [False, True])
def test_a_program_that_keeps_state_is_refused(tmp_path: Path, through_a_view: bool) -> None:
    write(tmp_path / "model.pt2", Keeper(through_a_view), (torch.ones(2),), None)

    with pytest.raises(ModelLoadError, match="keeps state between calls"):
        ExportedProgram(tmp_path / "model.pt2")


def test_a_program_exported_while_training_is_refused(tmp_path: Path) -> None:
    save(export(torch.nn.Dropout().train(), (torch.ones(2),)), tmp_path / "model.pt2")

    with pytest.raises(ModelLoadError, match=r"call eval\(\)"):
        ExportedProgram(tmp_path / "model.pt2")


# ---------------------------------------------------------------- hostile files


def rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None], **options: Any) -> Path:
    """A copy of an archive with its entries changed; None leaves one out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return target


def with_json(suffix: str, edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(suffix):
            return content
        value = json.loads(content)
        edit(value)
        return json.dumps(value).encode()

    return change


def node(target: str) -> Callable[[Any], None]:
    def edit(program: Any) -> None:
        program["graph_module"]["graph"]["nodes"][0]["target"] = target

    return edit


def weight(**fields: Any) -> Callable[[Any], None]:
    def edit(table: Any) -> None:
        entry = next(iter(table["config"].values()))
        for name, value in fields.items():
            (entry if name in entry else entry["tensor_meta"])[name] = value

    return edit


WEIGHTS, MODEL = "weights_config.json", "models/model.json"
HOSTILE: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "python": (MODEL, node("os.system"), "only ATen's are run"),
    "attributes": (MODEL, node("torch.ops.aten.__init__.__globals__"), "only ATen's|is no operation"),
    "module": (MODEL, node("torch.hub.load"), "only ATen's are run"),
    "a file mapped": (MODEL, node("torch.ops.aten.from_file.default"), "only ATen's are run"),
    "dunder": (MODEL, node("torch.ops.aten.add.__class__"), "is no operation|only ATen's"),
    "unknown": (MODEL, node("torch.ops.aten.no_such_thing.default"), "this torch does not know"),
    "higher order": (MODEL, node("torch.ops.higher_order.cond"), "only ATen's are run"),
    "schema": (MODEL, lambda p: p.update(schema_version={"major": 7, "minor": 0}), "schema version 7"),
    "no graph": (MODEL, lambda p: p.pop("graph_module"), "damaged"),
    "no nodes": (MODEL, lambda p: p["graph_module"]["graph"].update(nodes=3), "damaged"),
    "pickled weight": (WEIGHTS, weight(use_pickle=True), "stored as a pickle"),
    "path": (WEIGHTS, weight(path_name="../../../etc/passwd"), "odd file"),
    "missing": (WEIGHTS, weight(path_name="weight_99"), "damaged"),
    "too large": (WEIGHTS, weight(sizes=[{"as_int": 2**40}, {"as_int": 3}]), "does not fit into its"),
    "negative": (WEIGHTS, weight(strides=[{"as_int": -4}, {"as_int": 1}]), "does not fit into its"),
    "offset": (WEIGHTS, weight(storage_offset={"as_int": 2**62}), "does not fit into its"),
    "dtype": (WEIGHTS, weight(dtype=10), "type or layout"),
    "layout": (WEIGHTS, weight(layout=1), "type or layout"),
    "symbol": (WEIGHTS, weight(sizes=[{"as_expr": {"expr_str": "__import__('os')"}}]), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_one_clear_error(name: str, classifier: Path, tmp_path: Path) -> None:
    suffix, edit, message = HOSTILE[name]
    file = rewritten(classifier, tmp_path / "model.pt2", with_json(suffix, edit))

    with pytest.raises(ModelLoadError, match=message):
        ExportedProgram(file)


class Bomb:
    """Would leave a file behind if it were ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_sample_inputs_and_symbolic_expressions_are_never_evaluated(classifier: Path, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    pickled = io.BytesIO()
    torch.save(Bomb(canary), pickled)
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"

    def poison(name: str, content: bytes) -> bytes:
        if "sample_inputs" in name:
            return pickled.getvalue()
        return (
            content.replace(b'"expr_str": "s', f'"expr_str": "{code} or s'.encode())
            if name.endswith(MODEL)
            else content
        )

    program = ExportedProgram(rewritten(classifier, tmp_path / "model.pt2", poison))

    np.testing.assert_allclose(program.run({"ids": IDS.numpy()})[0], expected(IDS)[0], rtol=1e-6)
    assert not canary.exists()


def test_a_compressed_archive_is_refused_before_it_is_unpacked(classifier: Path, tmp_path: Path) -> None:
    file = rewritten(classifier, tmp_path / "model.pt2", lambda _, content: content, compression=zipfile.ZIP_DEFLATED)

    with pytest.raises(ModelLoadError, match="is compressed"):
        ExportedProgram(file)


def test_damage_anywhere_is_an_error_or_harmless(classifier: Path, tmp_path: Path) -> None:
    content, rng = classifier.read_bytes(), random.Random(0)
    file = tmp_path / "model.pt2"
    for round_number in range(150):
        damaged = bytearray(content)
        if round_number % 3 == 0:
            del damaged[rng.randrange(len(damaged)) :]
        for _ in range(rng.randint(1, 6)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            program = ExportedProgram(file)
        except ModelLoadError:
            continue
        with contextlib.suppress(Exception):  # a graph that is another one now may fail, but not crash
            program.run({"ids": IDS.numpy()})


def test_pickles_are_never_found_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "old" / "1" / "model.pt"
    file.parent.mkdir(parents=True)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)

    warn_of_pickles(tmp_path)

    assert find_models(tmp_path) == {}
    assert "never loaded" in caplog.text


def test_inputs_without_dimensions_are_served(tmp_path: Path) -> None:
    class Scaled(torch.nn.Module):
        def forward(self, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            return x * factor

    file = tmp_path / "model.pt2"
    write(file, Scaled(), (torch.ones(3), torch.tensor(2.0)), None)
    model = ArrayModel("scaled", "1", file, ExportedProgram(file))
    request = InferRequest("", {
        "factor": Tensor("factor", "FP32", (), np.float32(3).tobytes()),
        "x": Tensor("x", "FP32", (3,), np.arange(3, dtype=np.float32).tobytes()),
    })  # fmt: skip

    async def once() -> np.ndarray:
        answer = await model.infer_once(request, Caller())
        model.close()
        return answer.outputs[0].numbers()

    np.testing.assert_array_equal(asyncio.run(once()), [0, 3, 6])
