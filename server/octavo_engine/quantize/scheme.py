"""How weights are rounded: bits, groups, zero points; and the rounding itself."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from octavo_engine.errors import ConfigError
from octavo_kernels.quantized_weights import IntWeight

GROUP_SIZES = (128, 64, 32)
NARROW = 2_048  # inputs: models with narrower layers are small, and four bits cost them most
SPANS = {4: tuple(1.06 - 0.02 * step for step in range(16)), 8: (1.0, 0.96, 0.92)}  # of the extremes, by bits
WHOLE_SPAN = (1.0,)
REFINEMENTS = 2
CHUNK_WEIGHTS = 1 << 17
SMALLEST_SCALE = 1e-9


class Method(enum.StrEnum):
    """rtn: round to nearest. gptq: arXiv 2210.17323. awq: arXiv 2306.00978. smoothquant: arXiv 2211.10438.

    awq-gptq scales as AWQ does and rounds as GPTQ does.
    """

    RTN = "rtn"
    GPTQ = "gptq"
    AWQ = "awq"
    AWQ_GPTQ = "awq-gptq"
    SMOOTHQUANT = "smoothquant"


@dataclass(frozen=True, slots=True)
class Scheme:
    """Integer weights of `bits`; one scale for `group_size` inputs of a row (0: for the whole row).

    symmetric: no zero points. activation_bits: 8 where activations are rounded too, one scale a token; else 16.
    """

    bits: int
    group_size: int
    symmetric: bool
    activation_bits: int = 16

    @property
    def name(self) -> str:
        """`W4A16-g64`, `W8A8`."""
        return f"W{self.bits}A{self.activation_bits}" + (f"-g{self.group_size}" if self.group_size else "")


EXACT = Scheme(8, 0, symmetric=True)
"""What projections get that four bits would hurt most."""


def is_narrow(in_features: Iterable[int]) -> bool:
    """Whether a model with such projections gets more exact defaults."""
    return min(in_features, default=NARROW) < NARROW


def choose_scheme(
    method: Method, bits: int, group_size: int | None, symmetric: bool, in_features: Iterable[int]
) -> Scheme:
    """The scheme that fits every projection; raises `ConfigError`.

    `group_size` None takes the largest that divides, or 32 for narrow layers. SmoothQuant means W8A8 with one scale a
    row. Eight bits alone take one scale a row unless a group size is given.
    """
    if bits not in (4, 8):
        raise ConfigError(f"bits: must be 4 or 8, got {bits}")
    if method is Method.SMOOTHQUANT:
        if bits != 8 or group_size:
            raise ConfigError("method smoothquant: rounds weights and activations to 8 bits, without groups")
        return Scheme(8, 0, symmetric=True, activation_bits=8)
    if bits == 8 and not symmetric:
        raise ConfigError("asymmetric: only for 4 bits; 8 bits gain nothing from zero points")
    if group_size == 0 or (group_size is None and bits == 8):
        return Scheme(bits, 0, symmetric)
    widths = tuple(in_features)
    common = math.gcd(*widths)
    if group_size is None:
        fitting = [size for size in (GROUP_SIZES[-1:] if is_narrow(widths) else GROUP_SIZES) if common % size == 0]
        if not fitting:
            raise ConfigError(f"group_size: none of {GROUP_SIZES} divides the model's widths; use --group-size 0")
        return Scheme(bits, fitting[0], symmetric)
    if group_size < 16 or common % group_size:
        possible = [size for size in (*GROUP_SIZES, 16) if common % size == 0]
        raise ConfigError(f"group_size: {group_size} does not divide the model's widths; possible: {possible or 0}")
    return Scheme(bits, group_size, symmetric)


@dataclass(frozen=True, slots=True)
class Grid:
    """The values a weight may take: (code - zero) * scale. scales, zeros: [out, groups] float32; zeros None: none."""

    scales: torch.Tensor
    zeros: torch.Tensor | None
    low: int
    high: int

    def rows(self, rows: slice) -> Grid:
        """The grid of some rows."""
        return Grid(self.scales[rows], None if self.zeros is None else self.zeros[rows], self.low, self.high)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest codes. weight: [out, in] -> [out, in] float32 whole numbers."""
        rows, columns = weight.shape
        grouped = weight.view(rows, self.scales.shape[1], -1)
        codes = (grouped / self.scales.unsqueeze(-1)).round()
        if self.zeros is not None:
            codes += self.zeros.unsqueeze(-1)
        return codes.clamp_(self.low, self.high).view(rows, columns)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for. [out, in]"""
        rows, columns = codes.shape
        grouped = codes.view(rows, self.scales.shape[1], -1)
        if self.zeros is not None:
            grouped = grouped - self.zeros.unsqueeze(-1)
        return (grouped * self.scales.unsqueeze(-1)).view(rows, columns)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest values to a weight. [out, in]"""
        return self.values(self.codes(weight))


def fit_grid(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None, *, cut_extremes: bool = True
) -> Grid:
    """The grid with the least squared error over some ways to cut off the extremes of each group, and the scale that
    then suits its codes best.

    weight: [out, in] float32. importance: [in], how much the error of each input counts (mean squared activation).
    Scales are rounded to bfloat16, as they are stored.
    """
    rows, columns = weight.shape
    size = scheme.group_size or columns
    grouped = weight.reshape(-1, size)
    counts = None if importance is None else importance.view(-1, size).repeat(rows, 1)
    spans = SPANS[scheme.bits] if cut_extremes else WHOLE_SPAN
    chunk = max(CHUNK_WEIGHTS // size, 1)
    fitted = [
        _fit_chunk(
            grouped[start : start + chunk], None if counts is None else counts[start : start + chunk], scheme, spans
        )
        for start in range(0, grouped.shape[0], chunk)
    ]
    half = 1 << (scheme.bits - 1)
    scales, zeros = (torch.cat(parts).view(rows, -1) for parts in zip(*fitted, strict=True))
    if scheme.symmetric:
        return Grid(scales, None, -half, half - 1)
    return Grid(scales, zeros, 0, 2 * half - 1)


def _fit_chunk(
    groups: torch.Tensor, counts: torch.Tensor | None, scheme: Scheme, spans: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [n, 1] for groups [n, size]; a chunk is small enough to stay in the processor's cache."""
    half = 1 << (scheme.bits - 1)
    best = _BestGrid(groups, counts, (-half, half - 1) if scheme.symmetric else (0, 2 * half - 1))
    smallest, largest = groups.amin(-1, keepdim=True).clamp_max(0), groups.amax(-1, keepdim=True).clamp_min(0)
    extreme = torch.maximum(-smallest, largest)
    if scheme.bits == 4:  # there is one more code below 0 than above: a negative scale gives it to the larger side
        extreme = torch.where(largest > -smallest, -extreme, extreme)
    for span in spans:
        if scheme.symmetric:
            scales = _stored(extreme * (span / (half if scheme.bits == 4 else half - 1)))
            best.consider(scales, torch.zeros_like(scales))
        else:
            scales = _stored((largest - smallest) * (span / (2 * half - 1)))
            best.consider(scales, (-smallest * span / scales).round_().clamp_(0, 2 * half - 1))
    if len(spans) > 1:
        for _ in range(REFINEMENTS):
            best.consider(best.suited_scales(), best.zeros)
    return best.scales, best.zeros


class _BestGrid:
    """The scales and zeros [n, 1] with the least squared error that were considered for groups [n, size]."""

    def __init__(self, groups: torch.Tensor, counts: torch.Tensor | None, bounds: tuple[int, int]) -> None:
        self._groups, self._counts, self._bounds = groups, counts, bounds
        self.scales = self.zeros = groups.new_zeros(len(groups), 1)
        self._error = groups.new_full((len(groups), 1), torch.inf)

    def consider(self, scales: torch.Tensor, zeros: torch.Tensor) -> None:
        error = self._steps(scales, zeros).mul_(scales).sub_(self._groups).square_()
        if self._counts is not None:
            error *= self._counts
        error = error.sum(-1, keepdim=True)
        better = error < self._error
        self.scales, self.zeros = torch.where(better, scales, self.scales), torch.where(better, zeros, self.zeros)
        self._error = torch.minimum(error, self._error)

    def suited_scales(self) -> torch.Tensor:
        """What suits the codes that the best scales give best, by least squares."""
        steps = self._steps(self.scales, self.zeros)
        weighted = steps if self._counts is None else steps * self._counts
        spread = (weighted * steps).sum(-1, keepdim=True).clamp_min(1e-12)
        return _stored((weighted * self._groups).sum(-1, keepdim=True) / spread)

    def _steps(self, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Codes less their zero: how many scales from 0."""
        return (self._groups / scales).round_().add_(zeros).clamp_(*self._bounds).sub_(zeros)


def _stored(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scales).bfloat16().float()


def as_int_weight(codes: torch.Tensor, grid: Grid, scheme: Scheme) -> IntWeight:
    """Codes and their grid in the form kernels take: 4-bit codes count from 0, 8-bit ones are signed."""
    half = 1 << (scheme.bits - 1)
    if scheme.bits == 4:
        unsigned = codes if grid.zeros is not None else codes + half
        return IntWeight(unsigned.to(torch.uint8), grid.scales.bfloat16(), grid.zeros, 4)
    return IntWeight(codes.to(torch.int8), grid.scales.bfloat16(), None, 8)
