"""Scales that make weights easier to round: AWQ protects inputs that matter, SmoothQuant evens out activations."""

from __future__ import annotations

import torch

from octavo_engine.quantize.folding import Fold
from octavo_engine.quantize.scheme import Scheme, fit_grid
from octavo_engine.quantize.statistics import InputStatistics

AWQ_STEPS = 12
SMOOTHING = 0.5
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


def smoothquant_scale(fold: Fold, statistics: InputStatistics) -> torch.Tensor:
    """Half of the activations' range moves into the weights. Source: Xiao et al., arXiv 2211.10438. Returns [in]."""
    weights = fold.projection.weight.float().abs().amax(0).clamp_min(SMALLEST)
    scale = statistics.largest.clamp_min(SMALLEST) ** SMOOTHING / weights ** (1 - SMOOTHING)
    return fold.shared(scale).clamp_min(SMALLEST)


def _output_error(weight: torch.Tensor, scale: torch.Tensor, statistics: InputStatistics, scheme: Scheme) -> float:
    """Squared error of the outputs when the weight is rounded after scaling: trace(D G D^T)."""
    scaled = weight * scale
    difference = fit_grid(scaled, scheme, cut_extremes=False).rounded(scaled) / scale - weight
    return float(((difference @ statistics.gram) * difference).sum())
