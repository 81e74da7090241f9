"""A small model that guesses for a large one (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).

A guess is drawn with the very random numbers that the large model's own choice will be drawn with, and is kept if it
is that choice. So the output is the large model's, token for token, and two models that agree in distribution agree in
most draws, not only in the likeliest token (common random numbers; Daliri et al., arXiv 2408.07978).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch

from octavo_engine.errors import ConfigError
from octavo_engine.kv.block_manager import BlockManager, BlockTable
from octavo_engine.kv.block_pool import BlockPool
from octavo_engine.messages import ModelInfo
from octavo_engine.runner.interface import ModelRunner, SequenceSlice
from octavo_engine.sampler.sampler import Sampler
from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.speculation.curve import MeasuredCurve

_log = logging.getLogger(__name__)

_USUALLY_BEHIND = 16  # tokens; a pass over more of a sequence catches up with it, which is done once


@dataclass(slots=True)
class _Followed:
    """What the draft model has computed of a sequence: `num_computed` of its tokens, then its own last guesses."""

    table: BlockTable
    num_computed: int = 0
    guessed: list[int] = field(default_factory=list)

    def keep_up(self, tokens: list[int]) -> None:
        """Guesses that came true are computed tokens now."""
        start = self.num_computed
        for guess in self.guessed:
            if self.num_computed >= len(tokens) or tokens[self.num_computed] != guess:
                break
            self.num_computed += 1
        self.guessed = []
        # The last token is always computed again if need be: its logits are what the first guess is drawn from.
        self.num_computed = max(start, min(self.num_computed, len(tokens) - 1))


def check_vocabulary(draft: ModelInfo, model: ModelInfo) -> None:
    """Raise `ConfigError` for a draft model whose token ids cannot mean the same."""
    if draft.vocab_size != model.vocab_size:
        raise ConfigError(
            f"speculative_model: has {draft.vocab_size} tokens, the model has {model.vocab_size}; "
            "use a smaller model of the same family"
        )


class DraftModel:
    """Follows the sequences it is asked about with a KV cache of its own, prefixes shared.

    A sequence it has not followed yet is caught up with first, at most `max_num_tokens` a step over all of them. If the
    draft model fails, guessing ends for good and the engine goes on without.
    """

    def __init__(self, runner: ModelRunner, max_num_tokens: int, clock: Callable[[], float]) -> None:
        info = runner.info
        self.unavailable = ""
        self.pool = BlockPool(info.kv_blocks_total, info.kv_block_size)
        self._runner = runner
        self._max_num_tokens = max_num_tokens
        self._clock = clock
        self._blocks = BlockManager(self.pool)
        self._max_model_len = info.max_model_len
        self._sampler = Sampler()
        self._first_s = MeasuredCurve()  # by sequences: the pass that reads what was accepted and gives one guess
        self._next_s = MeasuredCurve()
        self._followed: dict[str, _Followed] = {}

    def seconds(self, num_sequences: int, depth: int) -> float:
        first_s = self._first_s.at(num_sequences) or 0.0
        next_s = self._next_s.at(num_sequences)
        return first_s + (depth - 1) * (first_s if next_s is None else next_s)

    def propose(self, wanted: Items[tuple[Sequence, int]]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in wanted]
        if self.unavailable:
            return drafts
        try:
            self._guess(wanted, drafts)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # guesses are never worth a request
            self.unavailable = f"{type(error).__name__}: {error}"
            _log.warning("the draft model failed and guesses no more: %s", type(error).__name__)
            return [[] for _ in wanted]
        return drafts

    def forget(self, seq: Sequence) -> None:
        followed = self._followed.pop(seq.request_id, None)
        if followed is not None:
            self._blocks.free(followed.table)

    def _guess(self, wanted: Items[tuple[Sequence, int]], drafts: list[list[int]]) -> None:
        """Rounds over all sequences together: the first catches up, each gives one more guess."""
        active = self._catch_up(wanted)
        for distance in range(max((wanted[index][1] for index in active), default=0)):
            going_on: list[int] = []
            slices = [self._slice(wanted[index][0], drafts[index]) for index in active]
            slices.sort(key=lambda piece: len(piece.token_ids) != 1)
            order = sorted(active, key=lambda index: self._num_new(wanted[index][0], drafts[index]) != 1)
            started = self._clock()
            logits = self._runner.forward(slices)
            states = [wanted[index][0].sampler for index in order]
            sampled = self._sampler.sample(logits, states, [distance] * len(order))
            if all(len(piece.token_ids) <= _USUALLY_BEHIND for piece in slices):
                (self._next_s if distance else self._first_s).observe(len(slices), self._clock() - started)
            for index, token in zip(order, sampled.token_ids, strict=True):
                seq, count = wanted[index]
                followed = self._followed[seq.request_id]
                if drafts[index]:
                    followed.guessed.append(drafts[index][-1])
                else:
                    followed.num_computed = len(seq.tokens)
                    self._blocks.publish(followed.table, seq.tokens, followed.num_computed)
                if token < 0:
                    continue
                drafts[index].append(token)
                if len(drafts[index]) < count:
                    going_on.append(index)
            active = going_on

    def _catch_up(self, wanted: Items[tuple[Sequence, int]]) -> list[int]:
        """Indices of the sequences that can be guessed for now; long prompts are computed over several steps."""
        active: list[int] = []
        budget = self._max_num_tokens
        behind: list[SequenceSlice] = []
        for index, (seq, count) in enumerate(wanted):
            followed = self._follow(seq, count)
            if followed is None:
                continue
            missing = len(seq.tokens) - followed.num_computed
            if missing <= budget:
                budget -= missing
                active.append(index)
            elif budget > 1:
                start, end = followed.num_computed, followed.num_computed + budget
                behind.append(SequenceSlice(seq.tokens[start:end], start, followed.table.blocks, 0))
                followed.num_computed, budget = end, 0
        if behind:
            self._runner.forward(behind)
        return active

    def _follow(self, seq: Sequence, count: int) -> _Followed | None:
        """The sequence's blocks, with room for `count` guesses; None where memory or context end."""
        needed = len(seq.tokens) + count
        if needed > self._max_model_len:
            return None
        followed = self._followed.get(seq.request_id)
        if followed is None:
            table = BlockTable(seq.table.root, seq.tenant)
            match = self._blocks.match_prefix(table, seq.tokens)
            if self._blocks.num_free_after(match, needed) < 0:
                return None
            self._blocks.allocate(table, match, seq.tokens)
            followed = self._followed[seq.request_id] = _Followed(table, match.num_tokens)
        followed.keep_up(seq.tokens)
        return followed if self._blocks.grow(followed.table, needed) else None

    def _num_new(self, seq: Sequence, draft: list[int]) -> int:
        return 1 if draft else len(seq.tokens) - self._followed[seq.request_id].num_computed

    def _slice(self, seq: Sequence, draft: list[int]) -> SequenceSlice:
        """What the draft model must read to guess the token after `draft`."""
        followed = self._followed[seq.request_id]
        if draft:
            return SequenceSlice([draft[-1]], len(seq.tokens) + len(draft) - 1, followed.table.blocks, 1)
        return SequenceSlice(seq.tokens[followed.num_computed :], followed.num_computed, followed.table.blocks, 1)
