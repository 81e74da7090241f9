"""GPTQ: round one input after the other and let the rest of the row make up for the error.

Source: Frantar et al., arXiv 2210.17323, with inputs in order of importance and groups fixed beforehand.
"""

from __future__ import annotations

import torch

from octavo_engine.errors import ModelLoadError
from octavo_engine.quantize.scheme import Grid, Scheme, fit_grid
from octavo_engine.quantize.statistics import InputStatistics

BLOCK = 128
DAMPING = 0.01
MAX_DAMPING = 1e4


def gptq(weight: torch.Tensor, statistics: InputStatistics, scheme: Scheme) -> tuple[torch.Tensor, Grid]:
    """Codes and grid of a weight [out, in]; raises `ModelLoadError` when the statistics are unusable."""
    gram = statistics.gram.clone()
    unused = gram.diagonal() == 0
    gram.diagonal()[unused] = 1
    left = weight.clone()
    left[:, unused] = 0
    grid = fit_grid(left, scheme, statistics.mean_square)
    order = gram.diagonal().argsort(descending=True)
    inverse = _inverse_factor(gram[order][:, order], _damping(statistics))
    columns = weight.shape[1]
    group_of = torch.arange(columns, device=weight.device) // (columns // grid.scales.shape[1])
    scales = grid.scales[:, group_of[order]]
    zeros = grid.zeros[:, group_of[order]] if grid.zeros is not None else torch.zeros((), device=weight.device)
    left = left[:, order]
    codes = torch.empty_like(left)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty(weight.shape[0], end - start, device=weight.device)
        for column in range(start, end):
            scale = scales[:, column]
            zero = zeros[:, column] if zeros.dim() else zeros
            code = ((left[:, column] / scale).round() + zero).clamp_(grid.low, grid.high)
            error = (left[:, column] - (code - zero) * scale) / inverse[column, column]
            left[:, column + 1 : end].addr_(error, inverse[column, column + 1 : end], alpha=-1)
            codes[:, column] = code
            errors[:, column - start] = error
        left[:, end:].addmm_(errors, inverse[start:end, end:], alpha=-1)
    return codes[:, order.argsort()].contiguous(), grid


def _damping(statistics: InputStatistics) -> float:
    """The paper's one per cent, or more where there are few tokens for many inputs.

    What little text says about how inputs go together is partly chance, and errors would be moved where they do harm.
    """
    return max(DAMPING, statistics.gram.shape[0] / max(statistics.count, 1))


def _inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper Cholesky factor of the inverse of a damped Gram matrix."""
    while damping <= MAX_DAMPING:
        damped = gram + torch.eye(gram.shape[0], device=gram.device) * (damping * gram.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed:
                inverse: torch.Tensor = upper
                return inverse
        damping *= 10
    raise ModelLoadError("gptq: the calibration text gives no usable statistics; give more or other text")
