"""The fast path of filtered sampling: read the vocabulary once, then work on the few tokens that can matter.

A row is cut into runs of 32 tokens. Whatever is among the k most likely tokens lies in one of the k runs with the
largest maxima, because each of these holds a token at least as likely as the k-th run's maximum. So: one pass writes
the runs' maxima (and the softmax's denominator), a second finds the 128 best runs, a third loads their 4,096 tokens
into registers and finishes there. Rows this cannot answer exactly (top-k above 128, a top-p that reaches further, too
many equal maxima, no filter, greedy) stay `PENDING` for the kernel that scans everything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from octavo_kernels.reference import sampling as reference
from octavo_kernels.triton.philox import gumbel_noise, ordered_key, uniform_bits

RUN = 32
RUNS = 128  # best runs kept; also the largest top-k
CHUNK = 128  # runs a program of the first pass reads
PENDING = tl.constexpr(-3)
GREEDY_TEMPERATURE = tl.constexpr(reference.GREEDY_TEMPERATURE)
SAMPLE_STREAM = tl.constexpr(reference.SAMPLE_STREAM)


@triton.jit
def is_filtered(temperature, top_k, top_p, vocab):
    """Whether a row draws from fewer tokens than all."""
    return (temperature >= GREEDY_TEMPERATURE) & (((top_k > 0) & (top_k < vocab)) | (top_p < 1.0))


@triton.jit
def _survey_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, maxima_ptr, stats_ptr, vocab, stride,
    RUN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """maxima: [rows, chunks * CHUNK], stats: [rows, chunks, 2], maximum and sum of exponentials of a chunk; the maximum
    is +inf where a logit is not a number. Grid: (rows, chunks)."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row)
    if is_filtered(temperature, tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), vocab) == 0:
        return
    run = chunk * CHUNK + tl.arange(0, CHUNK)
    token = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    x = tl.load(logits_ptr + row * stride + token, mask=token < vocab, other=float("-inf")) * (1.0 / temperature)
    maxima = tl.max(x, axis=1)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(tl.sum(tl.exp(x - tl.where(maximum == float("-inf"), 0.0, maximum)), axis=1), axis=0)
    spoiled = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0) > 0
    place = (row * tl.num_programs(1) + chunk) * 2
    tl.store(maxima_ptr + row * tl.num_programs(1) * CHUNK + run, maxima)
    tl.store(stats_ptr + place, tl.where(spoiled, float("inf"), maximum))
    tl.store(stats_ptr + place + 1, total)


@triton.jit
def _kth_key(keys, wanted):
    """The largest key t with count(keys >= t) >= wanted, by bisection over its bits."""
    threshold = tl.zeros((1,), tl.uint32)
    bit = threshold + 2147483648
    for _bit in range(32):
        trial = threshold + bit
        count = tl.sum((keys >= trial).to(tl.int32), axis=0)
        threshold = tl.where(count >= wanted, trial, threshold)
        bit = bit >> 1
    return tl.max(threshold, axis=0)


@triton.jit
def _select_kernel(
    temperature_ptr, top_k_ptr, top_p_ptr, maxima_ptr, stats_ptr, runs_ptr, floor_ptr, out_ptr, vocab, chunks,
    RUN: tl.constexpr, RUNS: tl.constexpr, CHUNK: tl.constexpr, TOTAL: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The best RUNS runs of a row in the order of their tokens ([rows, RUNS], padded with -1), and the smallest of
    their maxima, as a key: every token at least that likely lies in them. out becomes PENDING. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(out_ptr + row, tl.full((), PENDING, tl.int64))
    slots = tl.arange(0, RUNS)
    tl.store(runs_ptr + row * RUNS + slots, slots * 0 - 1)
    if is_filtered(tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), vocab) == 0:
        return
    chunk = tl.arange(0, CHUNKS)
    highest = tl.load(stats_ptr + (row * chunks + chunk) * 2, mask=chunk < chunks, other=float("-inf"))
    if tl.max(highest, axis=0) == float("inf"):
        return
    run = tl.arange(0, TOTAL)
    here = run * RUN < vocab
    maxima = tl.load(maxima_ptr + row * chunks * CHUNK + run, mask=here, other=float("-inf"))
    keys = tl.where(here, ordered_key(maxima), 0)
    floor = _kth_key(keys, tl.minimum(RUNS, tl.cdiv(vocab, RUN)))
    chosen = (keys >= floor) & here
    rank = tl.cumsum(chosen.to(tl.int32), axis=0)
    if tl.max(rank, axis=0) <= RUNS:
        tl.store(runs_ptr + row * RUNS + rank - 1, run, mask=chosen)
        tl.store(floor_ptr + row, floor.to(tl.int64))


@triton.jit
def _choose_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seeds_ptr, counters_ptr, stats_ptr, runs_ptr,
    floor_ptr, out_ptr, vocab, stride, chunks, RUN: tl.constexpr, RUNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Filter and draw among the candidates. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    runs = tl.load(runs_ptr + row * RUNS + tl.arange(0, RUNS))
    top_k = tl.load(top_k_ptr + row)
    limited = (top_k > 0) & (top_k < vocab)
    if (tl.max(runs, axis=0) < 0) | (limited & (top_k > RUNS)):
        return
    chunk = tl.arange(0, CHUNKS)
    stats = stats_ptr + (row * chunks + chunk) * 2
    highest = tl.load(stats, mask=chunk < chunks, other=float("-inf"))
    maximum = tl.max(highest, axis=0)
    if maximum == float("-inf"):
        return
    sums = tl.load(stats + 1, mask=chunk < chunks, other=0.0)
    total = tl.sum(tl.where(highest > float("-inf"), sums * tl.exp(highest - maximum), 0.0), axis=0)

    inverse = 1.0 / tl.load(temperature_ptr + row)
    tokens = tl.reshape(runs[:, None] * RUN + tl.arange(0, RUN)[None, :], (RUNS * RUN,))
    here = (tokens >= 0) & (tokens < vocab)
    x = tl.load(logits_ptr + row * stride + tokens, mask=here, other=float("-inf")) * inverse
    keys = tl.where(here, ordered_key(x), 0)
    weights = tl.where(here, tl.exp(x - maximum), 0.0)
    threshold = tl.max(tl.zeros((1,), tl.uint32), axis=0)
    ties = 2147483647.0
    if limited:
        threshold = _kth_key(keys, top_k)
        ties = top_k.to(tl.float32) - tl.sum((keys > threshold).to(tl.float32), axis=0)
        one = tl.max(tl.where(keys == threshold, weights, 0.0), axis=0)
        total = tl.sum(tl.where(keys > threshold, weights, 0.0), axis=0) + ties * one
    top_p = tl.load(top_p_ptr + row)
    if top_p < 1.0:
        floor = threshold
        wanted = top_p * total
        kept = tl.where(keys > floor, weights, 0.0)
        floor_mass = 0.0
        if limited:
            floor_mass = ties * tl.max(tl.where(keys == floor, weights, 0.0), axis=0)
        found = tl.zeros((1,), tl.uint32)
        bit = found + 2147483648
        for _bit in range(32):
            trial = found + bit
            mass = tl.sum(tl.where(keys >= trial, kept, 0.0), axis=0) + tl.where(trial <= floor, floor_mass, 0.0)
            found = tl.where(mass >= wanted, trial, found)
            bit = bit >> 1
        threshold = tl.max(found, axis=0)
        mass = tl.sum(tl.where(keys > threshold, weights, 0.0), axis=0)
        one = tl.max(tl.where(keys == threshold, weights, 0.0), axis=0)
        at = tl.sum(((keys == threshold) & here).to(tl.float32), axis=0)
        available = tl.where(limited & (threshold == floor), ties, at)
        ties = tl.minimum(available, tl.maximum(1.0, tl.ceil((wanted - mass) / tl.where(one > 0, one, 1.0))))
    if threshold.to(tl.int64) < tl.load(floor_ptr + row):
        return  # the set reaches below the candidates
    min_p = tl.load(min_p_ptr + row)
    least = tl.where(min_p > 0, maximum + tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
    at = ((keys == threshold) & here).to(tl.int32)
    rank = tl.cumsum(at, axis=0) - at
    keep = ((keys > threshold) | ((at > 0) & (rank.to(tl.float32) < ties))) & (x >= least) & here
    noise = gumbel_noise(uniform_bits(tl.load(seeds_ptr + row), tokens, tl.load(counters_ptr + row), SAMPLE_STREAM))
    x = tl.where(keep, x + noise, float("-inf"))
    best = tl.max(x, axis=0)
    token = tl.min(tl.where((x == best) & keep, tokens, 2147483647), axis=0)
    tl.store(out_ptr + row, token.to(tl.int64))


def sample_candidates(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    counters: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the token of every row that can be answered so, and `PENDING` for the others. Three launches."""
    rows, vocab = logits.shape
    device = logits.device
    chunks = triton.cdiv(vocab, RUN * CHUNK)
    maxima = torch.empty((rows, chunks * CHUNK), dtype=torch.float32, device=device)
    stats = torch.empty((rows, chunks, 2), dtype=torch.float32, device=device)
    runs = torch.empty((rows, RUNS), dtype=torch.int32, device=device)
    floor = torch.empty(rows, dtype=torch.int64, device=device)
    filters, sizes = (temperature, top_k, top_p), {"RUN": RUN, "RUNS": RUNS}
    width = triton.next_power_of_2(chunks)
    _survey_kernel[(rows, chunks)](
        logits, *filters, maxima, stats, vocab, logits.stride(0), RUN=RUN, CHUNK=CHUNK, num_warps=4
    )
    _select_kernel[(rows,)](
        *filters, maxima, stats, runs, floor, out, vocab, chunks,
        **sizes, CHUNK=CHUNK, TOTAL=width * CHUNK, CHUNKS=width, num_warps=8,
    )  # fmt: skip
    _choose_kernel[(rows,)](
        logits, *filters, min_p, seeds, counters, stats, runs, floor, out, vocab, logits.stride(0), chunks,
        **sizes, CHUNKS=width, num_warps=8,
    )  # fmt: skip
