"""The GGUF reader reads what the `gguf` package writes and turns every damage into one clear error."""

from __future__ import annotations

import random
import re
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.gguf_file import open_gguf
from octavo_kernels.gguf_types import GGMLType
from unit.engine_loading import gguf_bytes as raw


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file by the reference writer, with every kind of value and two tensors."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("some.count", 7)
    writer.add_int32("some.negative", -7)
    writer.add_float32("some.ratio", 0.5)
    writer.add_bool("some.flag", True)
    writer.add_string("some.name", "Grüße")
    writer.add_array("some.words", ["a", "", "ccc"])
    writer.add_array("some.numbers", [1, -2, 3])
    writer.add_tensor("dense", np.arange(6, dtype=np.float32).reshape(2, 3))
    quantized = gguf.quants.quantize(np.ones((4, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_of_every_type_is_read(written: Path) -> None:
    metadata = open_gguf(written).metadata

    assert metadata["some.count"] == 7
    assert metadata["some.negative"] == -7
    assert metadata["some.ratio"] == 0.5
    assert metadata["some.flag"] is True
    assert metadata["some.name"] == "Grüße"
    assert metadata["some.words"] == ["a", "", "ccc"]
    assert metadata["some.numbers"] == [1, -2, 3]


def test_tensors_are_views_in_row_major_shape(written: Path) -> None:
    tensors = open_gguf(written).tensors

    assert tensors["dense"].shape == (2, 3)
    assert tensors["dense"].data.view(torch.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["blocks"].shape == (4, 64)
    assert tensors["blocks"].ggml_type is GGMLType.Q8_0
    assert tensors["blocks"].data.shape == (4, 2 * 34)


def test_tensors_outlive_the_file_object(written: Path) -> None:
    data = open_gguf(written).tensors["dense"].data

    assert data.view(torch.float32).sum() == 15


HEADER_ERRORS = {
    "no magic": (raw.gguf(magic=b"GGML"), "instead of b'GGUF'"),
    "version 1": (raw.gguf(version=1), "version 1 is not supported"),
    "big-endian": (raw.gguf(version=0x03000000), "big-endian"),
    "empty": (b"", "cannot be read"),
    "only magic": (b"GGUF", "needs 4 bytes"),
    "absurd tensor count": (raw.gguf(num_tensors=2**63), "claims 9223372036854775808 tensors"),
    "more tensors than bytes": (raw.gguf(num_tensors=1000), "a table of 1000 tensors"),
    "absurd entry count": (raw.gguf(num_entries=2**40), "metadata entries"),
    "endless key": (
        raw.gguf(entries=[struct.pack("<Q", 2**62)], num_entries=1, data=bytes(99)),
        "a metadata key claims",
    ),
    "endless value": (
        raw.gguf(entries=[raw.metadata("k", raw.STRING, struct.pack("<Q", 2**62))], data=bytes(99)),
        "the value of k needs 4611686018427387904 bytes",
    ),
    "endless array": (
        raw.gguf(entries=[raw.metadata("k", raw.ARRAY, raw.array(raw.UINT8, 2**50, b""))], data=bytes(99)),
        "items of k",
    ),
    "array longer than the file": (
        raw.gguf(entries=[raw.metadata("k", raw.ARRAY, raw.array(raw.UINT8, 5000, b""))], data=bytes(99)),
        "a table of 5000 items of k",
    ),
    "string array longer than the file": (
        raw.gguf(entries=[raw.metadata("k", raw.ARRAY, raw.array(raw.STRING, 3, raw.text("x") * 2 + b"\xff" * 8))]),
        "an item of k needs",
    ),
    "nested arrays": (
        raw.gguf(entries=[raw.metadata("k", raw.ARRAY, raw.array(raw.ARRAY, 1, bytes(20)))]),
        "k nests arrays",
    ),
    "unknown value type": (raw.gguf(entries=[raw.metadata("k", 99, bytes(20))]), "unknown value type 99"),
    "key twice": (raw.gguf(entries=[raw.metadata("k", raw.UINT32, bytes(4))] * 2), "'k' occurs twice"),
    "alignment zero": (
        raw.gguf(entries=[raw.metadata("general.alignment", raw.UINT32, bytes(4))]),
        "general.alignment must be",
    ),
}
TENSOR_ERRORS = {
    "unknown type": ([raw.tensor("t", [32], 77, 0)], "GGML type 77"),
    "no dimensions": ([raw.tensor("t", [], raw.F32, 0)], "claims 0 dimensions"),
    "many dimensions": ([raw.tensor("t", [1] * 9, raw.F32, 0)], "claims 9 dimensions"),
    "dimension zero": ([raw.tensor("t", [32, 0], raw.F32, 0)], "impossible shape"),
    "product overflows": ([raw.tensor("t", [2**62, 2**62, 4], raw.F32, 0)], "impossible shape"),
    "partial block": ([raw.tensor("t", [33], raw.Q4_0, 0)], "no multiple of Q4_0's 32"),
    "beyond the end": ([raw.tensor("t", [32, 3], raw.F32, 0)], "the file is truncated"),
    "offset beyond the end": ([raw.tensor("t", [32], raw.F32, 2**60)], "the file is truncated"),
    "unaligned": ([raw.tensor("t", [8], raw.F32, 4)], "not aligned to 32"),
    "overlap": ([raw.tensor("t", [32], raw.F32, 0), raw.tensor("u", [32], raw.F32, 96)], "'t' and 'u' overlap"),
    "same name": ([raw.tensor("t", [8], raw.F32, 0), raw.tensor("t", [8], raw.F32, 32)], "the same name"),
}


@pytest.mark.parametrize("name", HEADER_ERRORS)
def test_a_damaged_header_is_one_clear_error(name: str, tmp_path: Path) -> None:
    content, message = HEADER_ERRORS[name]

    with pytest.raises(ModelLoadError, match=re.escape(message)):
        open_gguf(_write(tmp_path, content))


@pytest.mark.parametrize("name", TENSOR_ERRORS)
def test_an_impossible_tensor_is_one_clear_error(name: str, tmp_path: Path) -> None:
    tensors, message = TENSOR_ERRORS[name]

    with pytest.raises(ModelLoadError, match=re.escape(message)):
        open_gguf(_write(tmp_path, raw.gguf(tensors=tensors, data=bytes(256))))


def test_a_file_cut_anywhere_is_an_error_and_never_a_crash(written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()

    for length in range(0, len(content) - 32, 7):  # the last bytes are padding
        with pytest.raises(ModelLoadError):
            open_gguf(_write(tmp_path, content[:length]))


def test_flipped_bytes_never_crash_nor_allocate_much(written: Path, tmp_path: Path) -> None:
    content, rng = written.read_bytes(), random.Random(0)
    tracemalloc.start()
    try:
        for _ in range(300):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                open_gguf(_write(tmp_path, bytes(damaged)))
            except ModelLoadError:
                continue
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ModelLoadError, match=r"/nowhere/model\.gguf"):
        open_gguf(Path("/nowhere/model.gguf"))


def _write(folder: Path, content: bytes) -> Path:
    path = folder / "damaged.gguf"
    path.write_bytes(content)
    return path
