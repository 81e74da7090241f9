"""Random choice under temperature, top-k, top-p, min-p and typical-p, by inverting the distribution function.

Filters apply in the order temperature, top-k, top-p, min-p, typical-p, each on the distribution the one before it
left, as in Hugging Face transformers. One uniform number a row decides the token, so that a row's choice does not
depend on its neighbours. Rows whose candidates all lie among the `NUM_CANDIDATES` most likely tokens are never sorted
in full.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo_engine.sampling_params import SamplingParams

NUM_CANDIDATES = 512


def sample_rows(logits: torch.Tensor, params: Sequence[SamplingParams], draws: Sequence[float]) -> torch.Tensor:
    """Choose one token a row. `logits` [R, V] float32, processed; `draws` in [0, 1). Returns [R] int64."""
    device = logits.device
    temperature = torch.tensor([p.temperature for p in params], device=device).unsqueeze(1)
    draw = torch.tensor(draws, dtype=torch.float32, device=device).unsqueeze(1)
    scaled = logits / temperature
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0 or p.typical_p < 1.0]
    if not filtered:
        return _sample_unfiltered(scaled, params, draw)
    if len(filtered) == len(params):
        return _sample_filtered(scaled, params, draw)
    tokens = torch.empty(len(params), dtype=torch.int64, device=device)
    chosen = set(filtered)
    for rows, choose in (
        (filtered, _sample_filtered),
        ([i for i in range(len(params)) if i not in chosen], _sample_unfiltered),
    ):
        index = torch.tensor(rows, device=device)
        tokens[index] = choose(scaled[index], [params[i] for i in rows], draw[index])
    return tokens


def filtered_distribution(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The distribution rows are drawn from, [R, V], for verifying drafts; the same filters as `sample_rows`."""
    temperature = torch.tensor([p.temperature for p in params], device=logits.device).unsqueeze(1)
    ordered, ids = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    kept = _apply_filters(torch.softmax(ordered, dim=-1), params)
    probabilities = torch.zeros_like(kept).scatter_(1, ids, kept)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def _sample_unfiltered(scaled: torch.Tensor, params: Sequence[SamplingParams], draw: torch.Tensor) -> torch.Tensor:
    probabilities = torch.softmax(scaled, dim=-1)
    if any(p.min_p > 0.0 for p in params):
        floor = torch.tensor([p.min_p for p in params], device=scaled.device).unsqueeze(1)
        threshold = floor * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill_(probabilities < threshold, 0.0)
    return _invert(probabilities, draw)


def _sample_filtered(scaled: torch.Tensor, params: Sequence[SamplingParams], draw: torch.Tensor) -> torch.Tensor:
    vocab_size = scaled.shape[1]
    num_candidates = min(vocab_size, max(NUM_CANDIDATES, *(p.top_k for p in params)))
    if num_candidates < vocab_size and all(p.typical_p >= 1.0 for p in params):
        values, ids = torch.topk(scaled, num_candidates, dim=-1)
        probabilities = torch.exp(values - torch.logsumexp(scaled, dim=-1, keepdim=True))
        needed = torch.tensor([0.0 if p.top_k > 0 else p.top_p for p in params], device=scaled.device)
        if bool((probabilities.sum(dim=-1) >= needed).all()):
            index = _invert(_apply_filters(probabilities, params), draw)
            return ids.gather(1, index.unsqueeze(1)).squeeze(1)
    values, ids = torch.sort(scaled, dim=-1, descending=True, stable=True)
    index = _invert(_apply_filters(torch.softmax(values, dim=-1), params), draw)
    return ids.gather(1, index.unsqueeze(1)).squeeze(1)


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
