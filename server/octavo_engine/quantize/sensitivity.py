"""Which projections rounding hurts most, measured on text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo_engine.models.decoder import Decoder
from octavo_engine.quantize.observed import Projection
from octavo_engine.quantize.scheme import Scheme, fit_grid
from octavo_engine.quantize.statistics import MeanSquares
from octavo_engine.runner.batch_builder import build_packed

MEASURED_WINDOWS = 4


@torch.inference_mode()
def most_sensitive(
    model: Decoder,
    targets: Sequence[Projection],
    windows: Sequence[Sequence[int]],
    scheme: Scheme,
    share: float,
    device: torch.device,
) -> frozenset[int]:
    """`id`s of the projections that lose most of their outputs when rounded, up to `share` of all weights."""
    if share <= 0:
        return frozenset()
    seen = {id(item): MeanSquares(item.weight.shape[1], device) for item in targets}
    for item in targets:
        item.on_input = seen[id(item)].add
    for window in windows[:MEASURED_WINDOWS]:
        token_ids, batch = build_packed([window], device)
        model.forward(token_ids, batch, [None] * model.config.num_layers)
    for item in targets:
        item.on_input = None
    room = share * sum(item.weight.numel() for item in targets)
    chosen: set[int] = set()
    for item in sorted(targets, key=lambda item: -output_error(item.weight.float(), seen[id(item)].values, scheme)):
        if item.weight.numel() <= room:
            room -= item.weight.numel()
            chosen.add(id(item))
    return frozenset(chosen)


def output_error(weight: torch.Tensor, mean_squares: torch.Tensor, scheme: Scheme) -> float:
    """Expected squared error of the outputs over their expected square, inputs taken as independent.

    weight: [out, in]. mean_squares: [in], of the inputs.
    """
    difference = fit_grid(weight, scheme, cut_extremes=False).rounded(weight) - weight
    return float((difference.square() @ mean_squares).sum() / (weight.square() @ mean_squares).sum().clamp_min(1e-30))
