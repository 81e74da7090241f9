"""The part of a sequence that the next step computes."""

from __future__ import annotations

from octavo_engine.runner.interface import SequenceSlice
from octavo_engine.scheduler.sequence import Sequence


def decode_slice(seq: Sequence) -> SequenceSlice:
    """The last token, which a step in flight may still be choosing."""
    start, blocks = seq.num_launched, seq.table.blocks
    if seq.num_pending:
        return SequenceSlice([0], start, blocks, 1, seq.adapter_slot, seq.pending_row)
    return SequenceSlice(seq.tokens[start:], start, blocks, 1, seq.adapter_slot)


def verifying_slice(seq: Sequence) -> SequenceSlice:
    """The last token and the guesses after it, with logits for every one of them."""
    tokens = [seq.tokens[-1], *seq.drafted]
    return SequenceSlice(tokens, seq.num_computed, seq.table.blocks, len(tokens), seq.adapter_slot)


def prefill_slice(seq: Sequence, num_tokens: int) -> SequenceSlice:
    start = seq.num_launched
    end = start + num_tokens
    num_logits = num_tokens if seq.wants_prompt_logprobs else int(end == len(seq.tokens))
    return SequenceSlice(seq.tokens[start:end], start, seq.table.blocks, num_logits, seq.adapter_slot)
