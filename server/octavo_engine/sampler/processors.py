"""Edits of one row of logits before a token is chosen; each touches only the tokens it names."""

from __future__ import annotations

import numpy as np
import torch

from octavo_engine.sampler.state import SamplerState
from octavo_engine.staging import numbers

EXCLUDED = float("-inf")


def process_row(row: torch.Tensor, state: SamplerState) -> None:
    """Apply everything the sequence asks for to `row` ([vocab_size] float32), in place."""
    params = state.params
    if state.has_penalties:
        _penalise(row, state)
    if params.logit_bias:
        ids = _ids(row, list(params.logit_bias))
        row[ids] += numbers(list(params.logit_bias.values()), row.device, np.float32)
    if params.allowed_token_ids:
        ids = _ids(row, params.allowed_token_ids)
        allowed = row[ids]
        row.fill_(EXCLUDED)
        row[ids] = allowed
    if params.bad_words_ids:
        banned = _banned_tokens(params.bad_words_ids, state.tokens[state.num_prompt_tokens :])
        if banned:
            row.index_fill_(0, _ids(row, banned), EXCLUDED)
    if state.end_token_ids and state.num_output_tokens < params.min_tokens:
        row.index_fill_(0, _ids(row, state.end_token_ids), EXCLUDED)
    if state.constraint is not None:
        state.constraint.mask(row)


def _penalise(row: torch.Tensor, state: SamplerState) -> None:
    """Repetition penalty over prompt and output (CTRL, arXiv 1909.05858); presence and frequency over the output."""
    params = state.params
    counts = state.count_output()
    if params.repetition_penalty != 1.0:
        ids = _ids(row, sorted({*state.tokens[: state.num_prompt_tokens], *counts}))
        values = row[ids]
        penalty = params.repetition_penalty
        row[ids] = torch.where(values > 0, values / penalty, values * penalty)
    if counts and (params.presence_penalty != 0.0 or params.frequency_penalty != 0.0):
        ids = _ids(row, list(counts))
        times = numbers(list(counts.values()), row.device, np.float32)
        row[ids] -= params.frequency_penalty * times + params.presence_penalty


def _banned_tokens(bad_words: list[list[int]], output: list[int]) -> list[int]:
    """Tokens that would complete one of the forbidden sequences."""
    banned = []
    for word in bad_words:
        start = word[:-1]
        if word and (not start or output[-len(start) :] == start):
            banned.append(word[-1])
    return banned


def _ids(row: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return numbers(ids, row.device, np.int64)
