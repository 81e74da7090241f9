"""Folders of safetensors files are read whole or refused with one clear error."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.checkpoint import open_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8}


def write(
    folder: Path,
    shards: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    config: Any = CONFIG,
    weight_map: Mapping[str, str] | None = None,
) -> Path:
    for name, tensors in shards.items():
        save_file(dict(tensors), folder / name)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if weight_map is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_tensors_of_all_shards_are_found(tmp_path: Path) -> None:
    shards = {"a.safetensors": {"x": torch.ones(2)}, "b.safetensors": {"y": torch.zeros(3, dtype=torch.bfloat16)}}
    checkpoint = open_checkpoint(
        write(tmp_path, shards, weight_map={"x": "a.safetensors", "y": "b.safetensors"}),
    )

    assert checkpoint.names == {"x", "y"}
    assert torch.equal(checkpoint.get("x"), torch.ones(2))
    assert checkpoint.get("y").dtype == torch.bfloat16


def test_stop_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"x": torch.ones(1)}}, config={**CONFIG, "eos_token_id": 2})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))

    assert open_checkpoint(tmp_path).config.token_ids("eos_token_id") == (2, 7)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {"model.safetensors": {"x": torch.ones(1)}}))

    with pytest.raises(ModelLoadError, match="'y' is missing"):
        checkpoint.get("y")


def test_an_odd_dtype_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, {"model.safetensors": {"x": torch.ones(1, dtype=torch.float64)}}))

    with pytest.raises(ModelLoadError, match=r"has type torch\.float64; supported: float32"):
        checkpoint.get("x")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin"])
def test_an_index_cannot_point_outside_its_folder(name: str, tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"x": torch.ones(1)}}, weight_map={"x": name})

    with pytest.raises(ModelLoadError, match=r"is no plain \.safetensors file name"):
        open_checkpoint(tmp_path)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": {"x": torch.ones(1)}}, weight_map={"x": "gone.safetensors"})

    with pytest.raises(ModelLoadError, match=r"gone\.safetensors is missing"):
        open_checkpoint(tmp_path)


def test_the_same_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    shards = {name: {"x": torch.ones(1)} for name in ("a.safetensors", "b.safetensors")}
    write(tmp_path, shards, weight_map={"x": "a.safetensors", "y": "b.safetensors"})

    with pytest.raises(ModelLoadError, match=r"'x' is also in a\.safetensors"):
        open_checkpoint(tmp_path)


def _safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE = {
    "empty": b"",
    "header longer than the file": _safetensors({}, length=2**62),
    "header of a gigabyte": _safetensors({}, length=2**30),
    "header no json": struct.pack("<Q", 4) + b"}}}}",
    "truncated": _safetensors({"x": _entry(0, 400, [100])}, bytes(100)),
    "overlapping": _safetensors({"x": _entry(0, 8, [2]), "y": _entry(4, 12, [2])}, bytes(12)),
    "shape larger than its bytes": _safetensors({"x": _entry(0, 4, [2**40, 2**40])}, bytes(4)),
    "offsets backwards": _safetensors({"x": _entry(8, 4, [1])}, bytes(8)),
    "unknown dtype": _safetensors({"x": _entry(0, 4, [1], "Q99")}, bytes(4)),
    "a hole": _safetensors({"x": _entry(0, 4, [1]), "y": _entry(8, 12, [1])}, bytes(12)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(HOSTILE[name])

    with pytest.raises(ModelLoadError, match=r"model\.safetensors: is no valid safetensors file"):
        open_checkpoint(tmp_path)


CONFIGS = {
    "not json": ("{", "cannot be read as JSON"),
    "a list": ("[]", "must hold a JSON object"),
    "nested too deep": ("[" * 100_000, "cannot be read as JSON"),
    "not text": ('{"a": "\\ud800"', "cannot be read as JSON"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_broken_config_is_one_clear_error(name: str, tmp_path: Path) -> None:
    content, message = CONFIGS[name]
    write(tmp_path, {"model.safetensors": {"x": torch.ones(1)}}, config=content)

    with pytest.raises(ModelLoadError, match=message):
        open_checkpoint(tmp_path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")

    with pytest.raises(ModelLoadError, match="is a pickle, which can run code and is never loaded"):
        open_checkpoint(tmp_path)


def test_a_folder_of_several_gguf_models_asks_which(tmp_path: Path) -> None:
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")

    with pytest.raises(ModelLoadError, match=r"holds 2 GGUF models; name one of q4\.gguf, q8\.gguf"):
        open_checkpoint(tmp_path)


def test_a_path_that_does_not_exist_is_named() -> None:
    with pytest.raises(ModelLoadError, match="/nowhere: does not exist"):
        open_checkpoint(Path("/nowhere"))
