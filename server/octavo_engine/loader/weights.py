"""From a checkpoint's tensors to what layers hold: checked, fused, placed on the device and packed for its kernels."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch

from octavo_engine.errors import ModelLoadError
from octavo_engine.layers.linear import Linear
from octavo_engine.loader.checkpoint import Checkpoint
from octavo_engine.loader.cutting import cut, cut_vector
from octavo_engine.loader.quantization import OnTheFly, quantize
from octavo_engine.parallel.rank import SINGLE, Rank
from octavo_engine.parallel.sections import Rows, Section, as_rows, stored_size, whole
from octavo_kernels import ops
from octavo_kernels.quantized_weights import IntWeight
from octavo_kernels.registry import REFERENCE
from octavo_kernels.weights import GGUFWeight, QuantizedWeight, Weight

WeightType = TypeVar("WeightType", torch.Tensor, Weight)

_log = logging.getLogger(__name__)
_UNUSED = (  # tables we compute ourselves, and cache scales of tools: ours are measured for each token
    *("rotary_emb.inv_freq", "rope_freqs", "rope_factors_", "masked_bias", "position_ids"),
    *("self_attn.k_scale", "self_attn.v_scale"),
)


class WeightLoader:
    """Hands a model its weights by name and keeps account of them.

    dtype: of activations and dense weights. on_tensor: called with the fraction of tensors read so far.
    quantize_to: brings dense projections to this format; the output head gets int8 instead of int4. rank: where a model
    asks for its own part of it only; sizes given as sections are cut, and what is counted is what this rank holds.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        on_tensor: Callable[[float], None] | None = None,
        quantize_to: OnTheFly | None = None,
        rank: Rank = SINGLE,
    ) -> None:
        self.rank = rank
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.formats: Counter[str] = Counter()
        self.num_parameters = 0
        self.weight_bytes = 0
        self._on_tensor = on_tensor
        self._quantize_to = quantize_to
        self._read: set[str] = set()
        self._elsewhere: tuple[str, ...] = ()

    def leave(self, prefix: str) -> None:
        """Names that start so are read by other ranks."""
        self._elsewhere = (*self._elsewhere, prefix)

    def vector(self, name: str, size: int, *, offset: float = 0.0) -> torch.Tensor:
        """A norm's weight, kept in float32. [size]"""
        add = 0.0 if self.checkpoint.norms_hold_one else offset
        return self._account(self._dense(name, (size,)).to(self.device, torch.float32, copy=True) + add)

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A small dense tensor (bias, table) in the activations' type."""
        return self._account(self._dense(name, shape).to(self.device, self.dtype, copy=True))

    def per_row(self, name: str, rows: int | Rows) -> torch.Tensor:
        """A value for each row (bias, sinks) in the activations' type."""
        sections = as_rows(rows)
        values = cut_vector(self._dense(name, (stored_size(sections),)), sections)
        return self._account(values.to(self.device, self.dtype, copy=True))

    def dense(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A stack of matrices as stored, for a model to take apart and `pack`."""
        return self._dense(name, shape)

    def dense_matrix(self, name: str, rows: int | Rows, columns: int) -> torch.Tensor:
        """A matrix in the activations' type, whatever it is stored as: one that a model multiplies in its own way."""
        weight = self._matrix(name, rows, columns)
        dense = weight.dequantize(self.dtype) if isinstance(weight, QuantizedWeight) else weight
        return self._account(dense.to(self.device, self.dtype))

    def raw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Codes of a format of the model's own, as stored."""
        tensor = self._get(name)
        if isinstance(tensor, QuantizedWeight) or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise self._wrong_shape(name, tuple(tensor.shape), shape)
        return tensor

    def rows(self, name: str, rows: int | Rows, columns: int) -> Weight:
        """An embedding table, left in the form of the file: rows are looked up, never multiplied."""
        weight = self._matrix(name, rows, columns)
        return weight.to(self.device) if isinstance(weight, QuantizedWeight) else weight.to(self.device, self.dtype)

    def head(self, name: str, rows: int | Rows, columns: int) -> Weight:
        """The output head, ready for `ops.linear`."""
        return self.pack(self._matrix(name, rows, columns), head=True)

    def linear(
        self,
        outputs: Mapping[str, int | Rows],
        inputs: int | Section,
        *,
        bias: bool = False,
        exact: bool = False,
        reduce: bool = True,
    ) -> Linear:
        """Projections of one input fused into one. outputs: prefix -> out_features, in the order of the result.

        exact: never quantized on the fly (routers and gates, small and sensitive). Over a section of the inputs a
        product is partial: it is summed over the tensor ranks, unless `reduce` leaves that to the caller.
        """
        parts = [self._matrix(f"{prefix}.weight", out, inputs) for prefix, out in outputs.items()]
        biases = [self.per_row(f"{prefix}.bias", out) for prefix, out in outputs.items()] if bias else []
        fused = tuple(self.pack(part, exact=exact) for part in _concatenate(parts))
        partial = isinstance(inputs, Section) and not inputs.is_whole
        joined = torch.cat(biases) if biases else None
        if partial and not reduce and joined is not None and self.rank.tensor_rank:
            joined = None  # of ranks whose results the caller sums, the first adds the bias
        return Linear(fused, joined, self.rank.reduce if partial and reduce else None)

    def pack(self, weight: Weight, *, exact: bool = False, head: bool = False) -> Weight:
        """Place a weight on the device in the form its kernels want.

        exact: never quantized here. head: the output head, which int4 would hurt most. A quantized form no backend
        multiplies is made dense once: dequantizing at every step costs more.
        """
        if not isinstance(weight, QuantizedWeight) and not exact:
            weight = self._quantize(weight, head)
        if not isinstance(weight, QuantizedWeight):
            return self._account(ops.pack_weight(weight.to(self.device, self.dtype)))
        packed = ops.pack_weight(weight.to(self.device))
        if isinstance(packed, QuantizedWeight):
            probe = torch.empty((1, packed.shape[1]), dtype=self.dtype, device=self.device)
            if ops.linear.backend_for(probe, packed) == REFERENCE:
                self._say_dequantized(weight.format)
                packed = ops.pack_weight(weight.to(self.device).dequantize(self.dtype))
        return self._account(packed, weight.format)

    def tie(self, table: Weight) -> tuple[Weight, Weight]:
        """(embedding, head) from one table; one object where a kernel both looks up and multiplies the packed form.

        The file's own copy is then let go. A head quantized on the fly never replaces the embedding.
        """
        head = self.pack(table, head=True)
        if self._quantize_to is None and isinstance(head, QuantizedWeight):
            probe = torch.zeros(1, dtype=torch.int64, device=self.device)
            if ops.embedding.backend_for(probe, head, self.dtype) != REFERENCE:
                return head, head
        return table, head

    def _quantize(self, weight: torch.Tensor, head: bool) -> Weight:
        kind = OnTheFly.INT8 if head and self._quantize_to is OnTheFly.INT4 else self._quantize_to
        return weight if kind is None else quantize(weight, kind, self.device) or weight

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Raise `ModelLoadError` if the checkpoint holds tensors the model never asked for.

        Biases of zeros are let pass: GPTQ's tools write them beside every projection.
        """
        left = sorted(
            name
            for name in self.checkpoint.names - self._read
            if not any(mark in name for mark in (*_UNUSED, *ignored))
            and not name.startswith(self._elsewhere)
            and not self._is_empty_bias(name)
        )
        if left:
            shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
            raise ModelLoadError(
                f"{self.checkpoint.path}: {len(left)} tensors have no place in this architecture ({shown}); "
                "the checkpoint is of another variant than its configuration says"
            )

    def _is_empty_bias(self, name: str) -> bool:
        if not name.endswith(".bias"):
            return False
        bias = self.checkpoint.get(name)
        return isinstance(bias, torch.Tensor) and not bool(bias.any())

    def describe_formats(self) -> str:
        """How the projections are stored, most frequent first: `Q4_1, Q8_0 as bfloat16`, or `none`."""
        return ", ".join(name for name, _ in self.formats.most_common()) or "none"

    def _matrix(self, name: str, rows: int | Rows, columns: int | Section) -> Weight:
        sections, columns = as_rows(rows), columns if isinstance(columns, Section) else whole(columns)
        weight = self._checked(name, self._get(name), (stored_size(sections), columns.size))
        return cut(weight, sections, columns, name)

    def _dense(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        weight = self._checked(name, self._get(name), shape)
        if isinstance(weight, QuantizedWeight):
            raise ModelLoadError(f"{self.checkpoint.path}: {name} is stored as {weight.format}; expected plain numbers")
        return weight

    def _checked(self, name: str, weight: Weight, shape: tuple[int, ...]) -> Weight:
        if tuple(weight.shape) != shape:
            raise self._wrong_shape(name, tuple(weight.shape), shape)
        if isinstance(weight, torch.Tensor) and not weight.dtype.is_floating_point:
            raise ModelLoadError(f"{self.checkpoint.path}: {name} has type {weight.dtype}; expected floating point")
        return weight

    def _get(self, name: str) -> Weight:
        weight = self.checkpoint.get(name)
        self._read.add(name)
        if self._on_tensor:
            self._on_tensor(len(self._read) / max(1, len(self.checkpoint.names)))
        return weight

    def _wrong_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> ModelLoadError:
        return ModelLoadError(
            f"{self.checkpoint.path}: {name} has shape {list(found)}, the configuration asks for {list(expected)}"
        )

    def _say_dequantized(self, stored: str) -> None:
        if f"{stored} as {_name(self.dtype)}" not in self.formats:
            _log.warning(
                "no kernel on %s multiplies %s weights: they are kept as %s, in more memory than the file",
                self.device.type,
                stored,
                _name(self.dtype),
            )

    def _account(self, weight: WeightType, stored: str | None = None) -> WeightType:
        """Count a weight that stays in memory. stored: the quantized format it was read in."""
        rows, columns = (*weight.shape, 1)[:2]
        self.num_parameters += rows * columns
        self.weight_bytes += weight.nbytes
        if stored is not None:
            kept = weight.format if isinstance(weight, QuantizedWeight) else _name(self.dtype)
            self.formats[stored if kept == stored else f"{stored} as {kept}"] += 1
        return weight


def _concatenate(parts: list[Weight]) -> list[Weight]:
    """Neighbours of one storage format as one matrix, rows one after the other."""
    joined: list[Weight] = []
    for key, group in itertools.groupby(parts, key=_fusable):
        run = list(group)
        joined += [_join(run)] if key is not None and len(run) > 1 else run
    return joined


def _fusable(weight: Weight) -> object:
    """Neighbours with equal keys, other than None, can be one matrix."""
    match weight:
        case GGUFWeight():
            return weight.ggml_type
        case IntWeight():
            return weight.bits, weight.group_size, weight.zeros is None, weight.scales.dtype
        case QuantizedWeight():
            return None
        case _:
            return weight.dtype


def _join(run: list[Weight]) -> Weight:
    """Rows one after the other. run: weights of one kind."""
    match run[0]:
        case GGUFWeight(ggml_type=ggml_type, in_features=in_features):
            return GGUFWeight(_cat(run, "data"), ggml_type, in_features)
        case IntWeight(bits=bits, zeros=zeros):
            return IntWeight(
                _cat(run, "codes"), _cat(run, "scales"), None if zeros is None else _cat(run, "zeros"), bits
            )
        case _:
            return torch.cat([part for part in run if isinstance(part, torch.Tensor)])


def _cat(run: list[Weight], field: str) -> torch.Tensor:
    return torch.cat([getattr(part, field) for part in run])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
