"""A GGUF file as a checkpoint: its tensors under Hugging Face's names, weights left in their blocks."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

import torch

from octavo_engine.errors import ModelLoadError
from octavo_engine.loader.gguf_config import config_from_metadata
from octavo_engine.loader.gguf_file import GGUFFile, GGUFTensor, open_gguf
from octavo_engine.loader.gguf_names import hugging_face_name
from octavo_engine.models.raw_config import RawConfig
from octavo_kernels.gguf_types import GGMLType
from octavo_kernels.weights import GGUFWeight, Weight

_DENSE = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}
_INTERLEAVED_ROPE = frozenset({"llama", "smollm3"})
_QUERY_OR_KEY = re.compile(r"\.attn_([qk])\.(weight|bias)$")
_MAX_FILES = 256


class GGUFCheckpoint:
    """One GGUF model, in one file or split over several."""

    norms_hold_one = True

    def __init__(self, path: Path) -> None:
        self.path = path
        file = open_gguf(path)
        self.metadata = file.metadata
        self.architecture = str(file.metadata.get("general.architecture", ""))
        tensors = {name: tensor for part in _parts(file) for name, tensor in part.tensors.items()}
        self.config = RawConfig(config_from_metadata(self.metadata, tensors, path), str(path))
        self._tensors: dict[str, GGUFTensor] = {}
        for name, tensor in tensors.items():
            self._tensors |= _by_expert(hugging_face_name(name, self.architecture), tensor)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    @cached_property
    def is_quantized(self) -> bool:
        return any(tensor.ggml_type.is_quantized for tensor in self._tensors.values())

    def get(self, name: str) -> Weight:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelLoadError(f"{self.path}: no tensor for {name!r}")
        return self._as_weight(tensor)

    def _as_weight(self, tensor: GGUFTensor) -> Weight:
        data = tensor.data
        role = _QUERY_OR_KEY.search(tensor.name)
        vector = len(tensor.shape) == 1
        dense = _DENSE.get(tensor.ggml_type)
        if dense is not None:
            data = data.reshape(-1).view(dense).view(tensor.shape)
        elif len(tensor.shape) != 2:
            raise ModelLoadError(f"{self.path}: {tensor.name!r} has shape {list(tensor.shape)}, expected a matrix")
        if role and self.architecture in _INTERLEAVED_ROPE:
            data = _halves_from_pairs(data, self._heads(role[1]))
        if dense is not None:
            return data.reshape(-1) if vector else data
        return GGUFWeight(data, tensor.ggml_type, tensor.shape[1])

    def _heads(self, role: str) -> int:
        field = "num_attention_heads" if role == "q" else "num_key_value_heads"
        return self.config.integer(field)


def _parts(first: GGUFFile) -> list[GGUFFile]:
    """All files of a split model (`name-00001-of-00003.gguf`), the given one first."""
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return [first]
    stem, _, tail = first.path.stem.rpartition("-00001-of-")
    if not stem or count > _MAX_FILES or tail != f"{count:05d}":
        raise ModelLoadError(f"{first.path}: is part of a model split in {count}; name its -00001-of- file")
    others = [first.path.with_name(f"{stem}-{index:05d}-of-{count:05d}.gguf") for index in range(2, count + 1)]
    return [first, *(open_gguf(path) for path in others)]


def _by_expert(name: str, tensor: GGUFTensor) -> dict[str, GGUFTensor]:
    """A stack of experts' matrices [experts, out, in], or biases [experts, out], as one tensor for each."""
    if "{expert}" not in name or len(tensor.shape) < 2:
        return {name: tensor}
    count, *shape = tensor.shape
    stacks = tensor.data.view(count, -1, tensor.data.shape[1])
    return {
        name.format(expert=index): GGUFTensor(tensor.name, tuple(shape), tensor.ggml_type, data)
        for index, data in enumerate(stacks)
    }


def _halves_from_pairs(data: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the row order of llama.cpp's converter: it stores rotated dimensions as neighbours, we want two halves.

    data: [heads * head_dim, ...]; rows of quantized blocks move whole.
    """
    rows = data.shape[0]
    if rows % (2 * heads):
        raise ModelLoadError(f"a query or key projection of {rows} rows does not divide into {heads} heads")
    return data.view(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(data.shape)
