"""One sequence on its way through the engine."""

from __future__ import annotations

import enum

from octavo_engine.kv.block_manager import BlockTable
from octavo_engine.kv.hashing import root_key
from octavo_engine.lora.slots import LoadedAdapter
from octavo_engine.messages import AddRequest, TokenLogprobs
from octavo_engine.sampler.state import SamplerState, TokenConstraint
from octavo_engine.speculation.draft import Draft

MAX_PRIORITY = 100


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Tokens, KV blocks and progress of one request.

    `tokens` is the prompt followed by what was generated; the first `num_computed` of them are in the KV cache, and the
    first `num_resumed` generated ones come from elsewhere. At `max_length` tokens the sequence ends.
    While `num_in_flight` steps compute it, they bring it to `num_launched` positions, and its next `num_pending` tokens
    are being chosen: the first of them in row `pending_row` of its step's samples.
    `drafted` are guessed tokens that the current step verifies. `adapter_slot` is set while a sequence with an adapter
    runs.
    `rank` orders sequences that run, smaller first: the worst is preempted when memory runs out.
    """

    __slots__ = (
        "adapter",
        "adapter_slot",
        "arrival_s",
        "deadline_s",
        "draft",
        "drafted",
        "end_token_ids",
        "first_scheduled_s",
        "max_length",
        "num_cached_tokens",
        "num_computed",
        "num_in_flight",
        "num_launched",
        "num_overtaken",
        "num_pending",
        "num_preemptions",
        "num_prompt_tokens",
        "num_resumed",
        "pending_row",
        "priority",
        "prompt_logprobs",
        "rank",
        "request_id",
        "sampler",
        "sampling",
        "state",
        "table",
        "tenant",
        "tokens",
        "wants_prompt_logprobs",
    )

    def __init__(
        self,
        request: AddRequest,
        arrival_s: float,
        *,
        seed: int = 0,
        end_token_ids: frozenset[int] = frozenset(),
        constraint: TokenConstraint | None = None,
        adapter: LoadedAdapter | None = None,
        max_model_len: int | None = None,
    ) -> None:
        self.request_id = request.request_id
        self.tenant = request.tenant
        self.sampling = request.sampling
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.max_length = self.num_prompt_tokens + request.sampling.max_tokens
        if max_model_len is not None:
            self.max_length = min(self.max_length, max_model_len)
        self.num_resumed = len(request.output_token_ids)
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        self.adapter = adapter
        self.adapter_slot: int | None = None
        content = () if adapter is None else (adapter.adapter.name, adapter.adapter.digest)
        root = root_key(request.cache_salt, content)
        self.table = BlockTable(root, request.tenant, request.adapter, labels=request.prefix_labels)
        self.sampler = SamplerState(
            request.sampling, seed, self.tokens, self.num_prompt_tokens, end_token_ids, constraint
        )
        self.end_token_ids = end_token_ids
        self.wants_prompt_logprobs = request.sampling.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.draft: Draft | None = None
        self.drafted: list[int] = []
        self.num_computed = 0
        self.num_launched = 0
        self.num_in_flight = 0
        self.num_pending = 0
        self.pending_row = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_overtaken = 0
        self.priority = max(-MAX_PRIORITY, min(MAX_PRIORITY, request.priority))
        self.rank = (self.priority, arrival_s)
        self.arrival_s = arrival_s
        self.first_scheduled_s: float | None = None
        self.deadline_s = None if request.deadline_s is None else arrival_s + request.deadline_s
        self.state = SequenceState.WAITING

    @property
    def length(self) -> int:
        """Tokens, those that are being chosen among them."""
        return len(self.tokens) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        """Positions that no step has computed or is computing."""
        return len(self.tokens) + self.num_pending - self.num_launched

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.state.value}, prompt={self.num_prompt_tokens}, "
            f"output={self.num_output_tokens}, computed={self.num_computed})"
        )
