"""From logits to tokens: penalties, grammar masks, filters with Gumbel noise, log-probabilities, draft verification.

Noise depends on (seed, counter, token) alone, so a request draws the same tokens in any batch.
"""

from __future__ import annotations

import torch

from octavo_kernels.reference.noise import gumbel, philox, uniform

GREEDY_TEMPERATURE = 1e-5
NOT_FINITE = -1
ALL_EXCLUDED = -2
EXCLUDED = float("-inf")
# Streams keep draws for different purposes apart.
SAMPLE_STREAM, ACCEPT_STREAM, RECOVER_STREAM = 0, 1, 2


def apply_penalties(
    logits: torch.Tensor,
    output_counts: torch.Tensor,
    prompt_mask: torch.Tensor,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """Penalise tokens already seen, in place; returns logits.

    logits: [R, V] float32. output_counts: [S, V] int32, how often each token was generated; prompt_mask:
    [S, ceil(V / 32)] int32, bit i of word w set if token 32 * w + i is in the prompt; slots: [R] int64, a row's entry
    in both. repetition (over prompt and output; CTRL, arXiv 1909.05858), presence and frequency (over the output,
    OpenAI): [R] float32.
    """
    counts = output_counts[slots]
    seen = _bits(prompt_mask[slots], logits.shape[1]) | (counts > 0)
    factor = repetition.unsqueeze(1)
    penalised = torch.where(logits > 0, logits / factor, logits * factor)
    logits.copy_(torch.where(seen, penalised, logits))
    logits -= frequency.unsqueeze(1) * counts + presence.unsqueeze(1) * (counts > 0)
    return logits


def apply_bitmask(logits: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """Exclude the tokens a grammar forbids, in place; returns logits. bitmask: [R, ceil(V / 32)] int32, bit set for
    allowed tokens (the layout of XGrammar and llguidance)."""
    return logits.masked_fill_(~_bits(bitmask, logits.shape[1]), EXCLUDED)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """One token a row: [R] int64. Filters in the order temperature, top-k, top-p, min-p, each on what the one before
    left; then the largest of logit + Gumbel noise, which is a draw from the softmax.

    logits: [R, V] float32. temperature, top_p, min_p: [R] float32 (temperature below 1e-5 takes the best token);
    top_k: [R] int32, 0 for all; seeds, counters: [R] int64, the request's seed and the index of its token. Equal
    logits are kept in the order of their ids. `NOT_FINITE` for rows with NaN or +infinity, `ALL_EXCLUDED` for rows
    of -infinity only.
    """
    greedy = temperature < GREEDY_TEMPERATURE
    scaled = logits / torch.where(greedy, torch.ones_like(temperature), temperature).unsqueeze(1)
    kept = _kept(scaled, top_k, top_p, min_p)
    ids = torch.arange(logits.shape[1], device=logits.device)
    noise = gumbel(
        philox(seeds.unsqueeze(1), ids.unsqueeze(0), counters.unsqueeze(1), torch.full_like(ids, SAMPLE_STREAM))
    )
    drawn = (scaled + noise).masked_fill(~kept, EXCLUDED).argmax(1)
    tokens = torch.where(greedy, logits.argmax(1), drawn)
    best = logits.amax(1)
    return torch.where(torch.isfinite(best), tokens, torch.where(best == EXCLUDED, ALL_EXCLUDED, NOT_FINITE))


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability [R] float32, rank [R] int64) of one token a row; rank 1 is the most likely. logits: [R, V]."""
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    logprob = chosen.squeeze(1).float() - torch.logsumexp(logits.float(), 1)
    return logprob, (logits > chosen).sum(1) + 1


def verify_drafts(
    target: torch.Tensor,
    draft: torch.Tensor | None,
    draft_tokens: torch.Tensor,
    num_drafts: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Speculative decoding that leaves the target's distribution unchanged (Leviathan et al., arXiv 2211.17192).

    target: [S, K + 1, V] probabilities after filters; draft: [S, K, V] or None for drafts proposed with certainty
    (prompt lookup); draft_tokens: [S, K] int64; num_drafts: [S] int32. Draft i is accepted if a uniform number is
    below target / draft; the first rejected one is replaced by a draw from the positive part of target - draft, and
    after the last accepted one a token of the target follows. Returns [S, K + 1] int64: tokens, then -1.
    """
    sequences, width, vocab = target.shape
    out = torch.full((sequences, width), -1, dtype=torch.int64, device=target.device)
    ids = torch.arange(vocab, device=target.device)
    for s in range(sequences):
        count = int(num_drafts[s])
        for i in range(count + 1):
            counter = counters[s] + i
            residual = target[s, i].float()
            if i < count:
                token = draft_tokens[s, i]
                q = draft[s, i].float() if draft is not None else (ids == token).float()
                u = uniform(philox(seeds[s], torch.zeros_like(token), counter, torch.full_like(token, ACCEPT_STREAM)))
                if u * q[token] <= residual[token]:
                    out[s, i] = token
                    continue
                residual = (residual - q).clamp_min(0)
            noise = gumbel(philox(seeds[s], ids, counter, torch.full_like(ids, RECOVER_STREAM)))
            out[s, i] = (torch.log(residual) + noise).argmax()
            break
    return out


def _kept(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Which tokens the filters keep: [R, V] bool."""
    vocab = scaled.shape[1]
    ordered, ids = torch.sort(scaled, dim=1, descending=True, stable=True)
    probabilities = torch.softmax(ordered, 1)
    wanted = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).unsqueeze(1)
    kept = torch.arange(vocab, device=scaled.device).unsqueeze(0) < wanted
    left = probabilities * kept
    before = left.cumsum(1) - left
    kept &= (before < (top_p.unsqueeze(1) * left.sum(1, keepdim=True))) | (top_p.unsqueeze(1) >= 1)
    kept &= ordered >= ordered[:, :1] + torch.log(min_p).unsqueeze(1)
    return torch.zeros_like(kept).scatter_(1, ids, kept)


def _bits(words: torch.Tensor, count: int) -> torch.Tensor:
    """[R, W] int32 words as [R, count] bool."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).bool().flatten(1)[:, :count]
