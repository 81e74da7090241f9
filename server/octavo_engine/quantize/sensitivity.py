"""Which projections rounding hurts most, measured on text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import torch

from octavo_engine.models.decoder import Decoder, Layer
from octavo_engine.quantize.calibration import LayerWalk
from octavo_engine.quantize.observed import Projection
from octavo_engine.quantize.scheme import Scheme, fit_grid

MEASURED_WINDOWS, MEASURED_TOKENS = 4, 256
_EXPERT = re.compile(r"\bexperts\.\d+")

Group = list[Projection]


@torch.inference_mode()
def most_sensitive(
    model: Decoder,
    targets: Sequence[Projection],
    windows: Sequence[Sequence[int]],
    scheme: Scheme,
    share: float,
    device: torch.device,
) -> frozenset[int]:
    """`id`s of the projections that disturb what their layers hand on most when rounded, for each of their weights;
    up to `share` of all weights. The experts of a layer are measured, and chosen, together.
    """
    if share <= 0:
        return frozenset()
    walk = LayerWalk(model, [window[:MEASURED_TOKENS] for window in windows[:MEASURED_WINDOWS]], device)
    measured: list[tuple[float, Group]] = []
    for index, layer in enumerate(walk.layers()):
        exact = walk.hidden(layer)
        for group in _groups(targets, f"model.layers.{index}."):
            error = disturbance(walk, layer, exact, group, scheme)
            measured.append((error / _size(group), group))
    room = share * _size(targets)
    chosen: set[int] = set()
    for _, group in sorted(measured, key=lambda item: -item[0]):
        if _size(group) <= room:
            room -= _size(group)
            chosen.update(map(id, group))
    return frozenset(chosen)


def disturbance(walk: LayerWalk, layer: Layer, exact: Sequence[torch.Tensor], group: Group, scheme: Scheme) -> float:
    """Squared error of a layer's outputs over their squares, mean over tokens, with these projections rounded.

    A token's own size is what counts: the next layer norms it. exact: [T, hidden_size] of each window.
    """
    before = [item.weight for item in group]
    for item in group:
        item.weight = fit_grid(item.weight.float(), scheme, cut_extremes=False).rounded(item.weight.float())
    found = walk.hidden(layer)
    for item, weight in zip(group, before, strict=True):
        item.weight = weight
    shares = [
        (rounded - right).float().square().sum(-1) / right.float().square().sum(-1).clamp_min(1e-30)
        for rounded, right in zip(found, exact, strict=True)
    ]
    return float(torch.cat(shares).mean())


def _groups(targets: Sequence[Projection], prefix: str) -> list[Group]:
    """A layer's projections, its experts' by what they do."""
    groups: dict[str, Group] = defaultdict(list)
    for item in targets:
        name = next(iter(item.rows))
        if name.startswith(prefix):
            groups[_EXPERT.sub("experts", name)].append(item)
    return list(groups.values())


def _size(projections: Sequence[Projection]) -> int:
    return sum(item.weight.numel() for item in projections)
