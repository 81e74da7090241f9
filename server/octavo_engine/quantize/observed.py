"""A model whose projections can be watched and replaced while it runs; everything else of it is the real thing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from octavo_engine.layers.linear import Linear
from octavo_engine.loader.checkpoint import Checkpoint
from octavo_engine.loader.weights import WeightLoader
from octavo_engine.parallel.sections import Rows, Section
from octavo_kernels.quantized_weights import IntWeight
from octavo_kernels.weights import QuantizedWeight, Weight


class Projection:
    """One fused projection: its dense weight now, the names of its rows, and who watches its inputs.

    rows: prefix of the tensors' names -> number of rows, in order. weight: [sum of rows, in]. exact: the model wants
    it unrounded (routers).
    """

    def __init__(
        self, rows: Mapping[str, int], weight: torch.Tensor, bias: torch.Tensor | None, exact: bool = False
    ) -> None:
        self.rows = dict(rows)
        self.weight = weight
        self.bias = bias
        self.exact = exact
        self.on_input: Callable[[torch.Tensor], None] | None = None
        self.activation_bits = 16
        self.quantized: dict[str, IntWeight] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.on_input is not None:
            self.on_input(x)
        if self.activation_bits == 8:
            x = rounded_rows(x)
        return functional.linear(x, self.weight.to(x.dtype), self.bias)

    def rows_of(self, prefix: str) -> slice:
        """Where a part's rows lie."""
        start = 0
        for name, count in self.rows.items():
            if name == prefix:
                return slice(start, start + count)
            start += count
        raise KeyError(prefix)

    def part(self, suffix: str) -> str | None:
        """The prefix that ends in `.suffix`, if there is one."""
        return next((name for name in self.rows if name.endswith(f".{suffix}")), None)


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Activations as int8 with one scale a token would carry them."""
    scale = (x.float().abs().amax(-1, keepdim=True) / 127).clamp_min(1e-10)
    return ((x.float() / scale).round().clamp(-128, 127) * scale).to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedLinear(Linear):
    """Stands where a `Linear` does and asks its projection."""

    projection: Projection

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x)


class ObservingLoader(WeightLoader):
    """Loads a model densely and remembers what each tensor became, so that it can be written out again."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        on_tensor: Callable[[float], None] | None = None,
    ) -> None:
        super().__init__(checkpoint, dtype, device, on_tensor)
        self.projections: list[Projection] = []
        self.vectors: dict[str, tuple[torch.Tensor, float]] = {}
        self.biases: dict[str, tuple[Projection, slice]] = {}
        self.tables: list[torch.Tensor] = []

    def linear(
        self,
        outputs: Mapping[str, int | Rows],
        inputs: int | Section,
        *,
        bias: bool = False,
        exact: bool = False,
        reduce: bool = True,
    ) -> Linear:
        """As the real one, but dense and observed."""
        parts = [self._plain(f"{prefix}.weight", out, inputs) for prefix, out in outputs.items()]
        biases = [self.per_row(f"{prefix}.bias", out) for prefix, out in outputs.items()] if bias else []
        joined = torch.cat(biases) if biases else None
        sizes = {prefix: len(part) for prefix, part in zip(outputs, parts, strict=True)}
        projection = Projection(sizes, torch.cat(parts), joined, exact)
        self.projections.append(projection)
        if joined is not None:
            self.biases |= {f"{prefix}.bias": (projection, projection.rows_of(prefix)) for prefix in outputs}
        return ObservedLinear((), joined, projection=projection)

    def rows(self, name: str, rows: int | Rows, columns: int) -> Weight:
        """Dense: the table may be the head too."""
        self.tables.append(self._plain(name, rows, columns))
        return self.tables[-1]

    def head(self, name: str, rows: int | Rows, columns: int) -> Weight:
        """Dense: the head stays as it is."""
        return self.rows(name, rows, columns)

    def pack(self, weight: Weight, **_: bool) -> Weight:
        """Dense, for a head tied to the embedding."""
        return weight.dequantize(self.dtype) if isinstance(weight, QuantizedWeight) else weight.to(self.dtype)

    def vector(self, name: str, size: int, *, offset: float = 0.0) -> torch.Tensor:
        """A norm, which AWQ and SmoothQuant rescale in place."""
        weight = super().vector(name, size, offset=offset)
        self.vectors[name] = (weight, offset)
        return weight

    def round_as_stored(self, dtype: torch.dtype) -> None:
        """Bring what is not quantized to the values the new checkpoint will hold."""
        for weight, offset in self.vectors.values():
            weight.copy_((weight - offset).to(dtype).float() + offset)
        biases = [item.bias for item in self.projections if item.bias is not None]
        kept = [item.weight for item in self.projections if not item.quantized]
        for tensor in (*biases, *kept, *self.tables):
            tensor.copy_(tensor.to(dtype))

    @property
    def tensors_read(self) -> frozenset[str]:
        """The names the model asked for."""
        return frozenset(self._read)

    def _plain(self, name: str, rows: int | Rows, columns: int | Section) -> torch.Tensor:
        weight = self._matrix(name, rows, columns)
        dense = weight.dequantize(self.dtype) if isinstance(weight, QuantizedWeight) else weight
        return dense.to(self.device, self.dtype, copy=True)
