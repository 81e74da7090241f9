"""Sampling without a sort: thresholds are found by radix search over the logits' ordered bit patterns.

Most filtered rows are answered from a few candidates (`candidates.py`). For the others a row is scanned once for each
of the eight hexadecimal digits of a threshold (16 candidate digits at a time), from the L2 cache: exact for any
vocabulary, and rows without a filter skip the search (radix selection, with FlashInfer's idea of searching a pivot
instead of sorting). Noise is Philox at (token, counter), as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels import ops
from octavo_kernels.reference import sampling as reference
from octavo_kernels.triton.candidates import PENDING, sample_candidates
from octavo_kernels.triton.environment import runs_here
from octavo_kernels.triton.philox import gumbel_noise, ordered_key, to_uniform, uniform_bits

BLOCK = 1_024
SCAN = 4_096
NUM_WARPS = 8
ALL_EXCLUDED = tl.constexpr(reference.ALL_EXCLUDED)
NOT_FINITE = tl.constexpr(reference.NOT_FINITE)
GREEDY_TEMPERATURE = tl.constexpr(reference.GREEDY_TEMPERATURE)
SAMPLE_STREAM = tl.constexpr(reference.SAMPLE_STREAM)
ACCEPT_STREAM = tl.constexpr(reference.ACCEPT_STREAM)
RECOVER_STREAM = tl.constexpr(reference.RECOVER_STREAM)


@triton.jit
def _scaled(row_ptr, columns, vocab, inverse_temperature):
    return tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf")).to(tl.float32) * inverse_temperature


@triton.jit
def _search(
    row_ptr, vocab, inverse_temperature, maximum, wanted, floor_key, floor_mass,
    MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest key t with count(key >= t) >= wanted, or, with MASS, with mass(key >= t) >= wanted, where only keys
    above floor_key count, and floor_mass for those at or below it."""
    digits = tl.arange(0, 16)
    threshold = tl.zeros((1,), tl.uint32)
    shift = threshold + 32
    for _digit in range(8):
        shift -= 4
        pivots = threshold + (digits.to(tl.uint32) << shift)
        totals = tl.zeros((BLOCK, 16), tl.float32)
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = _scaled(row_ptr, columns, vocab, inverse_temperature)
            key = ordered_key(x)
            weight = tl.where(columns < vocab, 1.0, 0.0)
            if MASS:
                weight = tl.where(key > floor_key, tl.exp(x - maximum), 0.0)
            totals += tl.where(key[:, None] >= pivots[None, :], weight[:, None], 0.0)
        total = tl.sum(totals, axis=0)
        if MASS:
            total += tl.where(pivots <= floor_key, floor_mass, 0.0)
        digit = tl.max(tl.where(total >= wanted, digits, 0), axis=0)
        threshold += digit.to(tl.uint32) << shift
    return tl.max(threshold, axis=0)


@triton.jit
def _above(row_ptr, vocab, inverse_temperature, maximum, threshold, BLOCK: tl.constexpr):
    """(count above threshold, mass above it, count at it, weight of one at it)."""
    count = tl.zeros((BLOCK,), tl.float32)
    mass = tl.zeros((BLOCK,), tl.float32)
    ties = tl.zeros((BLOCK,), tl.float32)
    one = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = _scaled(row_ptr, columns, vocab, inverse_temperature)
        key = ordered_key(x)
        weight = tl.exp(x - maximum)
        count += tl.where(key > threshold, 1.0, 0.0)
        mass += tl.where(key > threshold, weight, 0.0)
        at = (key == threshold) & (columns < vocab)
        ties += tl.where(at, 1.0, 0.0)
        one = tl.maximum(one, tl.where(at, weight, 0.0))
    return tl.sum(count, axis=0), tl.sum(mass, axis=0), tl.sum(ties, axis=0), tl.max(one, axis=0)


@triton.jit
def _sample_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, counters_ptr, out_ptr,
    vocab, stride, BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """One row a program; rows whose token is already there are left alone."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(out_ptr + row) != PENDING:
        return
    row_ptr = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    greedy = temperature < GREEDY_TEMPERATURE
    inverse = tl.where(greedy, 1.0, 1.0 / temperature)

    maxima = tl.full((SCAN,), float("-inf"), tl.float32)
    spoiled = tl.zeros((SCAN,), tl.int32)
    for start in range(0, vocab, SCAN):
        x = _scaled(row_ptr, start + tl.arange(0, SCAN), vocab, inverse)
        maxima = tl.maximum(maxima, x)
        spoiled = spoiled | ((x != x) | (x == float("inf"))).to(tl.int32)
    maximum = tl.max(maxima, axis=0)
    not_finite = tl.max(spoiled, axis=0) > 0

    threshold = tl.max(tl.zeros((1,), tl.uint32), axis=0)  # keep keys above it, and `ties` of those at it
    ties = 2147483647.0
    if (not_finite == 0) & (greedy == 0):
        total = 0.0
        if (top_k > 0) & (top_k < vocab):
            threshold = _search(row_ptr, vocab, inverse, maximum, top_k.to(tl.float32), threshold, 0.0, False, BLOCK)
            above, mass, _at, one = _above(row_ptr, vocab, inverse, maximum, threshold, BLOCK)
            ties = top_k.to(tl.float32) - above
            total = mass + ties * one
        if top_p < 1.0:
            floor_mass = 0.0
            floor = threshold
            if total == 0.0:
                _count, total, _at, _one = _above(row_ptr, vocab, inverse, maximum, threshold, BLOCK)
            else:
                _count, mass, _at, one = _above(row_ptr, vocab, inverse, maximum, threshold, BLOCK)
                floor_mass = ties * one
            wanted = top_p * total
            threshold = _search(row_ptr, vocab, inverse, maximum, wanted, floor, floor_mass, True, BLOCK)
            _count, mass, at, one = _above(row_ptr, vocab, inverse, maximum, threshold, BLOCK)
            available = tl.where(threshold == floor, ties, at)
            ties = tl.minimum(available, tl.maximum(1.0, tl.ceil((wanted - mass) / tl.where(one > 0, one, 1.0))))
    least = tl.where(min_p > 0, maximum + tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))

    seed = tl.load(seeds_ptr + row)
    counter = tl.load(counters_ptr + row)
    best = float("-inf")
    token = 0
    ties_before = 0
    for start in range(0, vocab, SCAN):
        columns = start + tl.arange(0, SCAN)
        x = _scaled(row_ptr, columns, vocab, inverse)
        if greedy == 0:
            key = ordered_key(x)
            at = (key == threshold).to(tl.int32)
            rank = ties_before + tl.cumsum(at, axis=0) - at
            ties_before += tl.sum(at, axis=0)
            keep = ((key > threshold) | ((at > 0) & (rank.to(tl.float32) < ties))) & (x >= least) & (columns < vocab)
            x = tl.where(keep, x + gumbel_noise(uniform_bits(seed, columns, counter, SAMPLE_STREAM)), float("-inf"))
        top, place = tl.max(x, axis=0, return_indices=True)
        token = tl.where(top > best, start + place, token)
        best = tl.maximum(best, top)
    token = tl.where(maximum == float("-inf"), ALL_EXCLUDED, token)
    token = tl.where(not_finite, NOT_FINITE, token)
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def _plain_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, counters_ptr, values_ptr, tokens_ptr,
    vocab, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows that draw from all tokens, or greedily: the best token of a part of the row, with its noise, +inf where a
    logit is not finite. Grid: (rows, parts)."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if _plain(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), vocab) == 0:
        return
    greedy = temperature < GREEDY_TEMPERATURE
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = _scaled(logits_ptr + row * stride, columns, vocab, tl.where(greedy, 1.0, 1.0 / temperature))
    spoiled = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), axis=0) > 0
    if greedy == 0:
        noise = gumbel_noise(
            uniform_bits(tl.load(seeds_ptr + row), columns, tl.load(counters_ptr + row), SAMPLE_STREAM)
        )
        x = tl.where(x > float("-inf"), x + noise, x)
    top, place = tl.max(x, axis=0, return_indices=True)
    part = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(values_ptr + part, tl.where(spoiled, float("inf"), top))
    tl.store(tokens_ptr + part, tl.program_id(1) * BLOCK + place)


@triton.jit
def _plain(temperature, top_k, top_p, min_p, vocab):
    return (temperature < GREEDY_TEMPERATURE) | (((top_k <= 0) | (top_k >= vocab)) & (top_p >= 1.0) & (min_p <= 0.0))


@triton.jit
def _plain_choice_kernel(
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, values_ptr, tokens_ptr, out_ptr, vocab, parts,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The best of a row's parts; of equal ones the first."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    if _plain(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row), vocab) == 0:
        return
    best, token = best_part(values_ptr + row * parts, tokens_ptr + row * parts, parts, PARTS)
    token = tl.where(best == float("-inf"), ALL_EXCLUDED, token)
    tl.store(out_ptr + row, tl.where(best == float("inf"), NOT_FINITE, token).to(tl.int64))


@triton.jit
def best_part(values_ptr, tokens_ptr, parts, PARTS: tl.constexpr):
    """(largest value, its token) of a row's parts; of equal ones the first."""
    i = tl.arange(0, PARTS)
    values = tl.load(values_ptr + i, mask=i < parts, other=float("-inf"))
    best, place = tl.max(values, axis=0, return_indices=True)
    return best, tl.load(tokens_ptr + place)


@triton.jit
def _penalties_kernel(
    logits_ptr, counts_ptr, prompt_ptr, slots_ptr, repetition_ptr, presence_ptr, frequency_ptr,
    vocab, words, stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < vocab
    slot = tl.load(slots_ptr + row)
    count = tl.load(counts_ptr + slot * vocab + columns, mask=mask, other=0)
    word = tl.load(prompt_ptr + slot * words + columns // 32, mask=mask, other=0)
    seen = (((word >> (columns % 32)) & 1) > 0) | (count > 0)
    x = tl.load(logits_ptr + row * stride + columns, mask=mask, other=0.0)
    factor = tl.load(repetition_ptr + row)
    x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, factor + tl.zeros_like(x)), x * factor), x)
    present = tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
    x -= tl.load(frequency_ptr + row) * count.to(tl.float32) + present
    tl.store(logits_ptr + row * stride + columns, x, mask=mask)


@triton.jit
def _bitmask_kernel(logits_ptr, bitmask_ptr, vocab, words, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(bitmask_ptr + row * words + columns // 32, mask=columns < vocab, other=-1)
    excluded = ((word >> (columns % 32)) & 1) == 0
    place = logits_ptr + row * stride + columns
    tl.store(place, tl.zeros((BLOCK,), tl.float32) + float("-inf"), mask=excluded & (columns < vocab))


@triton.jit
def _logprobs_kernel(logits_ptr, tokens_ptr, logprob_ptr, rank_ptr, vocab, stride, BLOCK: tl.constexpr):
    """One pass: running maximum and sum for each lane, and how many logits are larger."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.minimum(tl.maximum(tl.load(tokens_ptr + row), 0), vocab - 1)
    chosen = tl.load(logits_ptr + row * stride + token).to(tl.float32)
    maxima = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    larger = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        x = _scaled(logits_ptr + row * stride, start + tl.arange(0, BLOCK), vocab, 1.0)
        new = tl.maximum(maxima, x)
        safe = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(maxima - safe) + tl.exp(x - safe)
        maxima = new
        larger += (x > chosen).to(tl.int32)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(sums * tl.exp(maxima - maximum), axis=0)
    tl.store(logprob_ptr + row, chosen - maximum - tl.log(total))
    tl.store(rank_ptr + row, (tl.sum(larger, axis=0) + 1).to(tl.int64))


@triton.jit
def _accept_kernel(
    target_ptr, draft_ptr, tokens_ptr, num_drafts_ptr, seeds_ptr, counters_ptr, accepted_ptr, out_ptr, width, vocab,
    ONE_HOT: tl.constexpr,
):  # fmt: skip
    """One sequence a program: walk the drafts until one is rejected."""
    seq = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.maximum(tl.load(num_drafts_ptr + seq), 0), width - 1)
    seed = tl.load(seeds_ptr + seq)
    counter = tl.load(counters_ptr + seq)
    for i in range(width):
        tl.store(out_ptr + seq * width + i, tl.full((), -1, tl.int64))
    accepted = 0
    going = 1
    while (going > 0) & (accepted < count):
        token = tl.load(tokens_ptr + seq * (width - 1) + accepted)
        token = tl.minimum(tl.maximum(token, 0), vocab - 1)
        bits = uniform_bits(seed, tl.zeros((1,), tl.int32), counter + accepted, ACCEPT_STREAM)
        u = tl.max(to_uniform(bits), axis=0)
        p = tl.load(target_ptr + (seq * width + accepted) * vocab + token)
        q = 1.0 if ONE_HOT else tl.load(draft_ptr + (seq * (width - 1) + accepted) * vocab + token)
        if u * q <= p:
            tl.store(out_ptr + seq * width + accepted, token)
            accepted += 1
        else:
            going = 0
    tl.store(accepted_ptr + seq, accepted)


@triton.jit
def _recover_kernel(
    target_ptr, draft_ptr, tokens_ptr, num_drafts_ptr, seeds_ptr, counters_ptr, accepted_ptr, values_ptr, best_ptr,
    width, vocab, ONE_HOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The token after the accepted ones: the best of a part of the vocabulary, with noise. Grid: (sequences, parts)."""
    seq = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.maximum(tl.load(num_drafts_ptr + seq), 0), width - 1)
    accepted = tl.load(accepted_ptr + seq)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    p = tl.load(target_ptr + (seq * width + accepted) * vocab + columns, mask=inside, other=0.0).to(tl.float32)
    if accepted < count:  # rejected: draw from what the draft does not cover
        if ONE_HOT:
            token = tl.load(tokens_ptr + seq * (width - 1) + accepted)
            p = tl.where(columns == token, 0.0, p)
        else:
            q = tl.load(draft_ptr + (seq * (width - 1) + accepted) * vocab + columns, mask=inside, other=0.0)
            p = tl.maximum(p - q.to(tl.float32), 0.0)
    position = tl.load(counters_ptr + seq) + accepted
    noise = gumbel_noise(uniform_bits(tl.load(seeds_ptr + seq), columns, position, RECOVER_STREAM))
    x = tl.where(inside & (p > 0), tl.log(tl.where(p > 0, p, 1.0)) + noise, float("-inf"))
    top, place = tl.max(x, axis=0, return_indices=True)
    part = seq * tl.num_programs(1) + tl.program_id(1)
    tl.store(values_ptr + part, top)
    tl.store(best_ptr + part, tl.program_id(1) * BLOCK + place)


@triton.jit
def _recover_choice_kernel(accepted_ptr, values_ptr, best_ptr, out_ptr, width, parts, PARTS: tl.constexpr):
    seq = tl.program_id(0).to(tl.int64)
    _best, token = best_part(values_ptr + seq * parts, best_ptr + seq * parts, parts, PARTS)
    tl.store(out_ptr + seq * width + tl.load(accepted_ptr + seq), token.to(tl.int64))


def _float_rows(logits: torch.Tensor) -> bool:
    return runs_here(logits) and logits.dtype == torch.float32 and logits.stride(1) == 1 and logits.shape[0] > 0


@ops.sample.register("triton", supports=lambda logits, *rest: _float_rows(logits))
def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Six launches. Filtered rows and rows without a filter read the vocabulary once, spread over many programs; the
    few that need the full search up to 22 times, in one program each."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    sample_candidates(logits, temperature, top_k, top_p, min_p, seeds, counters, out)
    parts = triton.cdiv(vocab, SCAN)
    values = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    _plain_kernel[(rows, parts)](
        logits, temperature, top_k, top_p, min_p, seeds, counters, values, tokens, vocab, logits.stride(0),
        BLOCK=SCAN, num_warps=NUM_WARPS,
    )  # fmt: skip
    _plain_choice_kernel[(rows,)](
        temperature, top_k, top_p, min_p, values, tokens, out, vocab, parts,
        PARTS=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    _sample_kernel[(rows,)](
        logits, temperature, top_k, top_p, min_p, seeds, counters, out, vocab, logits.stride(0),
        BLOCK=BLOCK, SCAN=SCAN, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


@ops.apply_penalties.register("triton", supports=lambda logits, *rest: _float_rows(logits))
def apply_penalties(
    logits: torch.Tensor,
    output_counts: torch.Tensor,
    prompt_mask: torch.Tensor,
    slots: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    rows, vocab = logits.shape
    _penalties_kernel[(rows, triton.cdiv(vocab, BLOCK))](
        logits, output_counts, prompt_mask, slots, repetition, presence, frequency, vocab, prompt_mask.shape[1],
        logits.stride(0), BLOCK=BLOCK,
    )  # fmt: skip
    return logits


@ops.apply_bitmask.register("triton", supports=lambda logits, bitmask: _float_rows(logits) and bitmask.is_contiguous())
def apply_bitmask(logits: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    rows, vocab = logits.shape
    _bitmask_kernel[(rows, triton.cdiv(vocab, BLOCK))](
        logits, bitmask, vocab, bitmask.shape[1], logits.stride(0), BLOCK=BLOCK
    )
    return logits


@ops.token_logprobs.register("triton", supports=lambda logits, token_ids: _float_rows(logits))
def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch, one scan; the log-softmax is never written."""
    rows, vocab = logits.shape
    logprob = torch.empty(rows, dtype=torch.float32, device=logits.device)
    rank = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _logprobs_kernel[(rows,)](
        logits, token_ids, logprob, rank, vocab, logits.stride(0), BLOCK=SCAN, num_warps=NUM_WARPS
    )
    return logprob, rank


@ops.verify_drafts.register(
    "triton",
    supports=lambda target, draft, *rest: (
        runs_here(target) and target.is_contiguous() and (draft is None or draft.is_contiguous())
    ),
)
def verify_drafts(
    target: torch.Tensor,
    draft: torch.Tensor | None,
    draft_tokens: torch.Tensor,
    num_drafts: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
) -> torch.Tensor:
    """Three launches; the host learns the accepted counts only when it reads the result."""
    sequences, width, vocab = target.shape
    out = torch.empty((sequences, width), dtype=torch.int64, device=target.device)
    accepted = torch.empty(sequences, dtype=torch.int32, device=target.device)
    parts = triton.cdiv(vocab, SCAN)
    values = torch.empty((sequences, parts), dtype=torch.float32, device=target.device)
    best = torch.empty((sequences, parts), dtype=torch.int32, device=target.device)
    drafts = (target, draft, draft_tokens, num_drafts, seeds, counters, accepted)
    _accept_kernel[(sequences,)](*drafts, out, width, vocab, ONE_HOT=draft is None, num_warps=1)
    _recover_kernel[(sequences, parts)](
        *drafts, values, best, width, vocab, ONE_HOT=draft is None, BLOCK=SCAN, num_warps=NUM_WARPS
    )
    _recover_choice_kernel[(sequences,)](
        accepted, values, best, out, width, parts, PARTS=triton.next_power_of_2(parts), num_warps=1
    )
    return out
