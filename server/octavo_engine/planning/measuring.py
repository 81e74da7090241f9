"""How many bytes a model's weights will take, found by its own code, reading only a few rows of each matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo_engine.config import EngineConfig
from octavo_engine.layers.linear import Linear
from octavo_engine.loader.checkpoint import Checkpoint, open_checkpoint
from octavo_engine.loader.cutting import cut
from octavo_engine.loader.load import max_model_len_of, on_the_fly
from octavo_engine.loader.quantization import OnTheFly
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.models.config import ModelConfig
from octavo_engine.models.registry import find_architecture
from octavo_engine.parallel.host import topology_of
from octavo_engine.parallel.rank import Rank
from octavo_engine.parallel.sections import Rows, Section, as_rows, held_size, stored_size, whole
from octavo_engine.parallel.topology import check_topology
from octavo_engine.runner.machine import choose_dtype, choose_kv_dtype
from octavo_kernels.quantized_weights import IntWeight
from octavo_kernels.weights import QuantizedWeight, Weight

_SAMPLE_ROWS = 128  # a block of the coarsest format
_POSITIONS = 16  # of rotary tables, whose size does not matter here


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one rank of a model keeps: bytes of its weights, of the table it only looks up, and of a token's cache."""

    architecture: str
    config: ModelConfig
    dtype: torch.dtype
    quantization: str
    max_model_len: int
    weight_bytes: int
    embedding_bytes: int
    kv_bytes_per_token: int
    can_generate: bool


class MeasuringLoader(WeightLoader):
    """Counts what would be kept. elsewhere: the weights are for a device that is not here, so they are taken to keep
    the bits they are stored in."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        quantize_to: OnTheFly | None,
        rank: Rank,
        *,
        elsewhere: bool,
    ) -> None:
        super().__init__(checkpoint, dtype, torch.device("cpu"), None, quantize_to, rank)
        self.embedding_bytes = 0
        self._elsewhere_device = elsewhere
        self._table_rows = 0
        self._kept: dict[tuple[str, tuple[int, ...], bool, bool], tuple[Weight, int]] = {}

    def linear(
        self,
        outputs: Mapping[str, int | Rows],
        inputs: int | Section,
        *,
        bias: bool = False,
        exact: bool = False,
        reduce: bool = True,
    ) -> Linear:
        """Parts of a few rows, counted as whole ones."""
        parts = []
        for prefix, out in outputs.items():
            sample = self._sample(f"{prefix}.weight", out, inputs)
            parts.append(self._count(sample, held_size(as_rows(out)), exact=exact))
            if bias:
                self.per_row(f"{prefix}.bias", out)
        return Linear(tuple(parts))

    def rows(self, name: str, rows: int | Rows, columns: int) -> Weight:
        """The table's sample; its bytes are those of the file's form, or of `dtype`."""
        sample, self._table_rows = self._sample(name, rows, columns), held_size(as_rows(rows))
        if not isinstance(sample, QuantizedWeight):
            sample = sample.to(self.dtype)
        self.embedding_bytes = sample.nbytes * self._table_rows // sample.shape[0]
        return sample

    def head(self, name: str, rows: int | Rows, columns: int) -> Weight:
        """As the real one, of a sample."""
        return self._count(self._sample(name, rows, columns), held_size(as_rows(rows)), head=True)

    def tie(self, table: Weight) -> tuple[Weight, Weight]:
        """The head takes the file's own copy over where it keeps its form, as in the real loader."""
        before = self.weight_bytes
        head = self._count(table, self._table_rows, head=True)
        shared = isinstance(head, QuantizedWeight) or self.weight_bytes - before == self.embedding_bytes
        if shared and self._quantize_to is None:
            self.embedding_bytes = 0
        return table, head

    def pack(self, weight: Weight, *, exact: bool = False, head: bool = False) -> Weight:
        """A matrix the model took apart itself."""
        rows = weight.shape[0]
        sample = cut(weight, (Section(rows, 0, min(rows, _SAMPLE_ROWS)),), whole(weight.shape[1]), "")
        return self._count(sample, rows, exact=exact, head=head)

    def _sample(self, name: str, rows: int | Rows, columns: int | Section) -> Weight:
        sections, columns = as_rows(rows), columns if isinstance(columns, Section) else whole(columns)
        weight = self._checked(name, self._get(name), (stored_size(sections), columns.size))
        count = min(held_size(sections), _SAMPLE_ROWS)
        return cut(weight, (Section(weight.shape[0], 0, count),), columns, name)

    def _count(self, sample: Weight, rows: int, *, exact: bool = False, head: bool = False) -> Weight:
        """Matrices alike in form and width are packed once: layers repeat."""
        stored = sample.format if isinstance(sample, QuantizedWeight) else str(sample.dtype)
        key = (stored, tuple(sample.shape), exact, head)
        if key not in self._kept:
            before = self.weight_bytes, self.num_parameters
            self._kept[key] = self._keep(sample, exact, head)
            self.weight_bytes, self.num_parameters = before
        kept, size = self._kept[key]
        self.weight_bytes += size * rows // sample.shape[0]
        self.num_parameters += rows * sample.shape[1]
        return kept

    def _keep(self, sample: Weight, exact: bool, head: bool) -> tuple[Weight, int]:
        """(what becomes of a sample, its bytes)."""
        if self._elsewhere_device:
            kept = sample if isinstance(sample, QuantizedWeight) or exact else self._quantize(sample, head)
            return kept, _stored_bytes(kept, self.dtype)
        kept = super().pack(sample, exact=exact, head=head)
        return kept, kept.nbytes


def measure(path: Path, config: EngineConfig, device: torch.device, *, elsewhere: bool) -> Footprint:
    """The footprint of the largest rank. device: where the model is to run, which `elsewhere` says is not here.

    Raises what loading would: `ModelLoadError` and `ConfigError`.
    """
    checkpoint = open_checkpoint(path)
    architecture, model_class = find_architecture(checkpoint.config)
    model_config = model_class.configure(checkpoint.config, architecture)
    topology = topology_of(config)
    check_topology(model_config, topology)
    quantize_to = on_the_fly(config, checkpoint)
    quantized = checkpoint.is_quantized or quantize_to is not None
    dtype = _dtype(config.dtype, device, quantized=quantized, elsewhere=elsewhere)
    longest = max_model_len_of(config, model_config)
    found = []
    for stage in range(topology.pipeline):
        rank = Rank(topology, stage * topology.tensor)
        loader = MeasuringLoader(checkpoint, dtype, quantize_to, rank, elsewhere=elsewhere)
        model = model_class(model_config, loader, min(longest, _POSITIONS))
        found.append(
            Footprint(
                architecture=architecture,
                config=model_config,
                dtype=dtype,
                quantization=_format_names(loader, checkpoint),
                max_model_len=longest,
                weight_bytes=loader.weight_bytes,
                embedding_bytes=loader.embedding_bytes,
                kv_bytes_per_token=model.cache_layout.bytes_per_token(choose_kv_dtype(config.kv_cache_dtype, dtype)),
                can_generate=model.can_generate,
            )
        )
    return max(found, key=lambda item: item.weight_bytes + item.embedding_bytes)


def _dtype(name: str, device: torch.device, *, quantized: bool, elsewhere: bool) -> torch.dtype:
    if name == "auto" and elsewhere:
        return torch.bfloat16
    return choose_dtype(name, device, quantized=quantized)


def _format_names(loader: MeasuringLoader, checkpoint: Checkpoint) -> str:
    named = loader.describe_formats()
    return named if named != "none" or not checkpoint.is_quantized else "as stored"


def _stored_bytes(weight: Weight, dtype: torch.dtype) -> int:
    match weight:
        case IntWeight(codes=codes, scales=scales, zeros=zeros, bits=bits):
            return codes.numel() * bits // 8 + scales.nbytes + (0 if zeros is None else zeros.numel() * 2)
        case QuantizedWeight():
            return weight.nbytes
        case _:
            return weight.numel() * dtype.itemsize


Measure = Callable[[EngineConfig], Footprint]
