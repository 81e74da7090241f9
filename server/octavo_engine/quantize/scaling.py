"""Scales that make weights easier to round: AWQ protects inputs that matter, SmoothQuant evens out activations."""

from __future__ import annotations

import torch

from octavo_engine.quantize.folding import Fold
from octavo_engine.quantize.observed import rounded_rows
from octavo_engine.quantize.scheme import Scheme, fit_grid
from octavo_engine.quantize.statistics import InputStatistics

AWQ_STEPS = 12
SMOOTHING_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SMALLEST = 1e-4


def awq_scale(fold: Fold, statistics: InputStatistics, scheme: Scheme) -> torch.Tensor:
    """The power of the mean activation that leaves the least error in the projection's outputs.

    Source: Lin et al., arXiv 2306.00978. Returns [in]; all ones when no power helps.
    """
    weight = fold.projection.weight.float()
    mean = (statistics.absolute / max(statistics.count, 1)).clamp_min(SMALLEST)
    best, best_error = torch.ones_like(mean), _output_error(weight, torch.ones_like(mean), statistics, scheme)
    for step in range(1, AWQ_STEPS):
        scale = fold.shared(mean ** (step / AWQ_STEPS)).clamp_min(SMALLEST)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = _output_error(weight, scale, statistics, scheme)
        if error < best_error:
            best, best_error = scale, error
    return best


def smoothquant_scale(fold: Fold, statistics: InputStatistics, scheme: Scheme) -> torch.Tensor:
    """The share of the activations' range to move into the weights that leaves the least error in the outputs.

    Source: Xiao et al., arXiv 2211.10438, with the share searched for each projection. Returns [in]; all ones when no
    share helps.
    """
    weight, x = fold.projection.weight.float(), statistics.sample
    exact = x @ weight.t()
    weights = weight.abs().amax(0).clamp_min(SMALLEST)
    activations = x.abs().amax(0).clamp_min(SMALLEST)
    shares = [
        fold.shared(activations**share / weights ** (1 - share)).clamp_min(SMALLEST) for share in SMOOTHING_SHARES
    ]
    candidates = [torch.ones_like(weights), *shares]
    return min(candidates, key=lambda scale: float((_rounded_product(x, weight, scale, scheme) - exact).square().sum()))


def _rounded_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    scaled = weight * scale
    return rounded_rows(x / scale) @ fit_grid(scaled, scheme, cut_extremes=False).rounded(scaled).t()


def _output_error(weight: torch.Tensor, scale: torch.Tensor, statistics: InputStatistics, scheme: Scheme) -> float:
    """Squared error of the outputs when the weight is rounded after scaling: trace(D G D^T)."""
    scaled = weight * scale
    difference = fit_grid(scaled, scheme, cut_extremes=False).rounded(scaled) / scale - weight
    return float(((difference @ statistics.gram) * difference).sum())
