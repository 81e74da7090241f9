"""Random choice under temperature, top-k, top-p, min-p and typical-p, by inverting the distribution function.

Filters apply in the order temperature, top-k, top-p, min-p, typical-p, each on the distribution the one before it
left, as in Hugging Face transformers. One uniform number a row decides the token, so that a row's choice does not
depend on its neighbours. A row is sorted only as far as its filters need: the most likely 64 tokens first, more if
those do not cover them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo_engine.sampling_params import SamplingParams

CANDIDATES = (64, 1_024)
BLOCK = 64


def sample_rows(logits: torch.Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> torch.Tensor:
    """Choose one token a row. `logits` [R, V] float32, processed; `draws` in [0, 1). Returns [R] int64."""
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device).unsqueeze(1)
    draw = torch.tensor(draws, dtype=torch.float32, device=device).unsqueeze(1)
    probabilities = torch.softmax(logits / temperature, dim=-1)
    tokens = torch.empty(len(params), dtype=torch.int64, device=device)
    plain: list[int] = []
    pending: list[int] = []
    for i, p in enumerate(params):
        (pending if p.top_k > 0 or p.top_p < 1.0 or p.typical_p < 1.0 else plain).append(i)
    if plain:
        rows = _select(plain, len(params), device)
        tokens[rows] = _sample_unfiltered(probabilities[rows], [params[i] for i in plain], draw[rows])
    for width in (*(k for k in CANDIDATES if k < logits.shape[1]), logits.shape[1]):
        ready = [i for i in pending if _may_suffice(params[i], width, logits.shape[1])]
        if ready:
            rows = _select(ready, len(params), device)
            chosen, covered = _sample_top(probabilities[rows], [params[i] for i in ready], draw[rows], width)
            tokens[rows] = chosen
            done = {i for i, enough in zip(ready, covered, strict=True) if enough}
            pending = [i for i in pending if i not in done]
    return tokens


def filtered_distribution(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distribution rows are drawn from, [R, V], for verifying drafts; the same filters as `sample_rows`."""
    temperature = torch.tensor([p.temperature for p in params], device=logits.device).unsqueeze(1)
    ordered, ids = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    kept = _apply_filters(torch.softmax(ordered, dim=-1), params)
    probabilities = torch.zeros_like(kept).scatter_(1, ids, kept)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def _select(rows: list[int], total: int, device: torch.device) -> slice | torch.Tensor:
    """An index for some rows of all; a slice, which copies nothing, when it is all of them."""
    return slice(None) if len(rows) == total else torch.tensor(rows, device=device)


def _may_suffice(params: SamplingParams, width: int, vocab_size: int) -> bool:
    """Whether a row's filters can be decided on its `width` most likely tokens alone."""
    return width == vocab_size or (params.typical_p >= 1.0 and params.top_k <= width)


def _sample_unfiltered(
    probabilities: torch.Tensor, params: Sequence[SamplingParams], draw: torch.Tensor
) -> torch.Tensor:
    if any(p.min_p > 0.0 for p in params):
        floor = torch.tensor([p.min_p for p in params], device=probabilities.device).unsqueeze(1)
        threshold = floor * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < threshold, 0.0)
    return _invert_blocks(probabilities, draw) if probabilities.shape[1] % BLOCK == 0 else _invert(probabilities, draw)


def _sample_top(
    probabilities: torch.Tensor, params: Sequence[SamplingParams], draw: torch.Tensor, width: int
) -> tuple[torch.Tensor, list[bool]]:
    """Choose among the `width` most likely tokens; a row is covered when what is beyond them could not matter."""
    if width == probabilities.shape[1]:
        values, ids = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        covered = [True] * len(params)
    else:
        values, ids = torch.topk(probabilities, width, dim=-1)
        needed = torch.tensor([0.0 if p.top_k > 0 else p.top_p for p in params], device=probabilities.device)
        covered = (values.sum(dim=-1) >= needed).tolist()
    index = _invert(_apply_filters(values, params), draw)
    return ids.gather(1, index.unsqueeze(1)).squeeze(1), covered


def _apply_filters(probabilities: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Zero what the filters remove from rows sorted by falling probability; the rest is not renormalised."""
    device, width = probabilities.device, probabilities.shape[1]
    top_k = torch.tensor([p.top_k if p.top_k > 0 else width for p in params], device=device).unsqueeze(1)
    kept = probabilities * (torch.arange(width, device=device).unsqueeze(0) < top_k)
    mass = torch.where(top_k < width, kept.sum(dim=-1, keepdim=True), torch.ones_like(kept[:, :1]))
    top_p = torch.tensor([p.top_p for p in params], device=device).unsqueeze(1)
    before = kept.cumsum(dim=-1) - kept
    kept = kept.masked_fill((before >= top_p * mass) & (top_p < 1.0), 0.0)
    if any(p.min_p > 0.0 for p in params):
        floor = torch.tensor([p.min_p for p in params], device=device).unsqueeze(1)
        kept = kept.masked_fill(kept < floor * kept[:, :1], 0.0)
    if any(p.typical_p < 1.0 for p in params):
        kept = _keep_typical(kept, torch.tensor([p.typical_p for p in params], device=device).unsqueeze(1))
    return kept


def _keep_typical(kept: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """Keep the tokens whose information is nearest to the entropy (Meister et al., arXiv 2202.00666)."""
    probabilities = kept / kept.sum(dim=-1, keepdim=True)
    information = -torch.log(probabilities)
    entropy = (probabilities * information.nan_to_num(posinf=0.0)).nansum(dim=-1, keepdim=True)
    order = torch.argsort((information - entropy).abs(), dim=-1, stable=True)
    by_distance = probabilities.gather(1, order)
    before = by_distance.cumsum(dim=-1) - by_distance
    removed = torch.zeros_like(kept, dtype=torch.bool).scatter_(1, order, (before >= typical_p) & (typical_p < 1.0))
    return kept.masked_fill(removed, 0.0)


def _invert(probabilities: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """The first index at which the running sum exceeds `draw` times the total; [R]. Rows of NaN get the last index."""
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum(draw * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=probabilities.shape[1] - 1)


def _invert_blocks(probabilities: torch.Tensor, draw: torch.Tensor) -> torch.Tensor:
    """As `_invert`, in two levels: running sums over blocks, then inside the block; the width divides into blocks."""
    blocks = probabilities.view(len(probabilities), -1, BLOCK)
    sums = blocks.sum(dim=-1)
    cumulative = sums.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.minimum(draw * total, torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK)).squeeze(1).cumsum(dim=-1)
    total = inside[:, -1:]
    rest = (target - (cumulative.gather(1, block) - sums.gather(1, block))).clamp_(min=0.0)
    rest = torch.minimum(rest, torch.nextafter(total, torch.zeros_like(total)))
    offset = torch.searchsorted(inside, rest, right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + offset).squeeze(1)
