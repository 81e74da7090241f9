"""In which format a quantized checkpoint is written."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from octavo_engine.errors import ConfigError
from octavo_engine.quantize import compressed_tensors, gptq_layout
from octavo_engine.quantize.scheme import EXACT, Scheme
from octavo_kernels.quantized_weights import IntWeight


class Format(enum.StrEnum):
    """compressed-tensors holds every scheme; gptq 4-bit weights, for programs that read nothing newer."""

    COMPRESSED_TENSORS = "compressed-tensors"
    GPTQ = "gptq"


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight becomes tensors, and what config.json says of it."""

    encode: Callable[[str, IntWeight, Scheme], dict[str, torch.Tensor]]
    quantization_config: Mapping[str, Any]


def choose_layout(
    kind: Format, scheme: Scheme, rows: Sequence[int], kept: Sequence[str], exactly: Sequence[str]
) -> Layout:
    """The layout for projections of that many rows; raises `ConfigError`.

    kept: projections left as they are. exactly: those in 8 bits among others in 4.
    """
    if kind is Format.COMPRESSED_TENSORS:
        config = compressed_tensors.quantization_config(scheme, ["lm_head", *kept], EXACT, exactly)
        return Layout(compressed_tensors.encode, config)
    gptq_layout.check(scheme, rows)
    for names, what in ((kept, "leave out"), (exactly, "keep in 8 bits")):
        if names:
            raise ConfigError(f"format gptq: cannot {what} some projections ({names[0]}); use compressed-tensors")
    return Layout(gptq_layout.encode, gptq_layout.quantization_config(scheme))
