"""How a weight matrix is stored: dense, or one of the quantized forms. Models never look inside.

`Weight` is what `ops.linear` and `ops.embedding` take. A backend may repack a weight once at load time
(`ops.pack_weight`) into its own subclass of `QuantizedWeight`; whatever the form, `dequantize` tells the truth.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from octavo_kernels.gguf_types import GGMLType


class QuantizedWeight(ABC):
    """A weight matrix [out_features, in_features] kept in fewer bits.

    ROW_DIMENSION: which dimension of every tensor it holds counts the output rows.
    """

    ROW_DIMENSION: ClassVar[int] = 0

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held in memory, scales included."""

    @property
    @abstractmethod
    def format(self) -> str:
        """Short name for status and logs, such as `Q4_K` or `int4-g128`."""

    def to(self, device: torch.device) -> Self:
        """The same weight with every tensor it holds on a device. Subclasses are dataclasses."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        tensors = {name: value.to(device) for name, value in fields.items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)  # type: ignore[type-var]

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The dense matrix [out_features, in_features] this weight stands for."""


Weight = torch.Tensor | QuantizedWeight


@dataclass(frozen=True, slots=True)
class GGUFWeight(QuantizedWeight):
    """Rows of GGML blocks exactly as in the file.

    data: [out_features, bytes_per_row] uint8; each row is in_features / block_size blocks of `ggml_type`.
    """

    data: torch.Tensor
    ggml_type: GGMLType
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.in_features

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def format(self) -> str:
        return self.ggml_type.name

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        from octavo_kernels.reference.gguf_blocks import dequantize_rows

        return dequantize_rows(self.data, self.ggml_type, self.in_features).to(dtype)
