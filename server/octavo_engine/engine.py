"""The engine core: requests in, one step at a time, tokens out. No process, no socket, no clock but the one given."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import torch

from octavo_engine.config import EngineConfig
from octavo_engine.embedding import EmbeddingQueue
from octavo_engine.errors import InvalidRequestError, OctavoError, QueueFullError, RequestFailedError
from octavo_engine.isolation import run_isolated
from octavo_engine.kv.events import KVEventBatch, KVEventLog
from octavo_engine.kv.tiers import block_manager
from octavo_engine.lora.manager import AdapterManager
from octavo_engine.lora.slots import LoadedAdapter
from octavo_engine.messages import (
    AddRequest,
    EmbedRequest,
    EngineStats,
    FinishReason,
    LoadAdapter,
    ModelInfo,
    SequenceOutput,
    StepOutput,
    TokenLogprobs,
    UnloadAdapter,
)
from octavo_engine.prompt import check_prompt, check_resumed
from octavo_engine.rejection import rejection
from octavo_engine.roofline import Roofline
from octavo_engine.runner.interface import ModelRunner, SequenceSlice
from octavo_engine.sampler.logprobs import token_logprobs
from octavo_engine.sampler.noise import request_seed
from octavo_engine.sampler.sampler import ALL_EXCLUDED, NOT_FINITE, Sampler
from octavo_engine.sampler.state import SamplerState, TokenConstraint
from octavo_engine.scheduler.batch import Batch
from octavo_engine.scheduler.limits import limits_for
from octavo_engine.scheduler.preemption import CopyTime
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.scheduler.sequence import Sequence as Seq
from octavo_engine.scheduler.sequence import SequenceState
from octavo_engine.speculation.choose import choose_speculator
from octavo_engine.speculation.speculator import Speculator
from octavo_engine.structured.grammar_queue import GrammarQueue
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_engine.tokenizer.load import load_tokenizer

_FAILURES = {
    NOT_FINITE: "the model produced NaN or infinite logits for this request",
    ALL_EXCLUDED: "together with the request's other constraints every token is excluded",
}
# Settings that exclude tokens and their names in requests, the likeliest culprit first.
_EXCLUDING = {
    "allowed_token_ids": "allowed_token_ids",
    "structured": "structured",
    "bad_words_ids": "bad_words",
    "logit_bias": "logit_bias",
}


class EngineCore:
    """Schedules, computes and samples over a loaded runner whose KV cache is allocated.

    A request that cannot be computed ends alone with `FinishReason.ERROR`; only a runner that fails on everything
    ends the engine, with `isolation.StepFailedError` out of `step`.
    """

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
        tokenizer: Callable[[], Tokenizer] | None = None,
        roofline: Roofline | None = None,
        draft: ModelRunner | None = None,
    ) -> None:
        info = runner.info
        self._runner = runner
        self._config = config
        self._clock = clock
        self._roofline = roofline
        self._max_model_len = effective_max_model_len(info)
        self.model = msgspec.structs.replace(info, max_model_len=self._max_model_len)
        block_size = info.kv_block_size or config.block_size
        self._kv_events = KVEventLog(block_size) if config.kv_events_endpoint else None
        blocks = block_manager(config, info, block_size, self._kv_events)
        self.pool = blocks.pool
        self.adapters = AdapterManager(runner, config) if config.enable_lora else None
        self.scheduler = Scheduler(
            limits_for(config, info.device),
            blocks,
            None if self.adapters is None else self.adapters.slots,
            CopyTime(info.kv_bytes_per_token * block_size),
        )
        self.scheduler.speculator = choose_speculator(config, self.model, self.scheduler, draft, clock)
        self._embeddings = EmbeddingQueue(runner, self.scheduler.limits.max_num_batched_tokens)
        self._sampler = Sampler()
        self._eos = frozenset(info.eos_token_ids)
        self._grammars = GrammarQueue(tokenizer or (lambda: load_tokenizer(info.path)), info.vocab_size, self._eos)
        self._outputs: list[SequenceOutput] = []
        self._finished = {reason.value: 0 for reason in FinishReason}
        self._num_steps = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._step_time_s = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._embeddings or self._grammars or self._outputs or self.adapters)

    def add(self, request: AddRequest) -> None:
        """Queue a sequence. Raises `InvalidRequestError` or `QueueFullError`."""
        self._check_id(request.request_id)
        self.check_prompt(request.prompt_token_ids)
        request.sampling.validate(self.model.vocab_size)
        check_resumed(request.prompt_token_ids, request.output_token_ids, request.sampling, self.model)
        if self.model.task != "generate":
            raise InvalidRequestError(
                f"{self.model.name} is served to {self.model.task} and generates no text", "model"
            )
        self._adapter(request.adapter)
        structured = request.sampling.structured
        if structured is None:
            self._enqueue(request, self._clock(), None)
        else:
            self._check_room(len(self._grammars))
            self._grammars.add(request, structured, self._clock())

    def _enqueue(self, request: AddRequest, arrival_s: float, constraint: TokenConstraint | None) -> None:
        end_token_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            end_token_ids |= self._eos
        seed = request.sampling.seed
        if seed is None:
            seed = request_seed(self._config.seed, request.request_id)
        if constraint is not None:
            for token in request.output_token_ids:
                constraint.accept(token)
        adapter = self._adapter(request.adapter)
        seq = Seq(request, arrival_s, seed=seed, end_token_ids=end_token_ids, constraint=constraint, adapter=adapter)
        self.scheduler.add(seq)
        if self.adapters is not None and adapter is not None:
            self.adapters.slots.begin(adapter)

    def load_adapter(self, command: LoadAdapter) -> None:
        """Begin to load an adapter; an output says how it went. Raises `InvalidRequestError`."""
        self._adapter_manager().load(command)

    def unload_adapter(self, command: UnloadAdapter) -> None:
        """Forget an adapter once it is unused; an output says when. Raises `InvalidRequestError`."""
        self._adapter_manager().unload(command)

    def add_embedding(self, request: EmbedRequest) -> None:
        """Queue a text to pool. Raises `InvalidRequestError` or `QueueFullError`."""
        self._check_id(request.request_id)
        self.check_prompt(request.prompt_token_ids, room=0)
        self._check_room(len(self._embeddings))
        self._embeddings.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these sequences now; their blocks are free when this returns. Unknown ids are ignored."""
        for request_id in request_ids:
            seq = self.scheduler.get(request_id)
            if seq is not None:
                self._finish(seq, FinishReason.ABORT)
            else:
                self._embeddings.remove(request_id)
                self._grammars.remove(request_id)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running sequences go on."""
        self.pool.reset_cache()
        if self.scheduler.blocks.host is not None:
            self.scheduler.blocks.host.pool.reset_cache()

    def step(self) -> StepOutput:
        """Compute one batch. Raises `StepFailedError` when the runner itself is broken."""
        started = self._clock()
        for seq in self.scheduler.pop_expired(started):
            self._finish(seq, FinishReason.DEADLINE)
        if self._grammars:
            self._take_compiled()
        if self._embeddings:
            self._outputs.extend(self._embeddings.step())
        if self.adapters:
            self._outputs.extend(self.adapters.step(wait_for_one=not self.scheduler.has_work))
        batch = self.scheduler.schedule(started)
        self._move_blocks()
        if self.adapters is not None:
            for slot, adapter in self.adapters.slots.take_placements():
                self._runner.place_adapter(slot, adapter)
        if batch.slices:
            self._compute(batch)
        outputs, self._outputs = self._outputs, []
        self._num_steps += 1
        self._step_time_s = self._clock() - started
        return StepOutput(outputs=outputs, stats=self.stats())

    def heartbeat(self) -> None:
        """While there is no work: is all the model needs still there? Raises `EngineDeadError`."""
        self._runner.heartbeat()

    def _move_blocks(self) -> None:
        """Carry out the copies that scheduling decided on, before anything overwrites their sources."""
        host = self.scheduler.blocks.host
        if host is None or not host.has_transfers:
            return
        transfers = host.take_transfers()
        started = self._clock()
        for transfer in transfers:
            self._runner.move_blocks(transfer)
        self.scheduler.preemption.copy.observe(sum(map(len, transfers)), self._clock() - started)

    def take_kv_events(self) -> KVEventBatch | None:
        """What became of cached blocks since the last call; None if nothing did, or if nobody wants to know."""
        return None if self._kv_events is None else self._kv_events.take()

    def stats(self) -> EngineStats:
        scheduler, speculator = self.scheduler, self.scheduler.speculator
        host = scheduler.blocks.host
        return EngineStats(
            step=self._num_steps,
            time=time.time(),
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._embeddings) + len(self._grammars),
            num_waiting_tokens=scheduler.num_waiting_tokens + self._embeddings.num_tokens,
            kv_blocks_total=self.pool.num_blocks,
            kv_blocks_used=self.pool.num_used,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens + self._embeddings.num_tokens_done,
            generation_tokens=self._generation_tokens,
            requests_finished=dict(self._finished),
            step_time_s=self._step_time_s,
            retry_after_s=scheduler.retry_after_s,
            queued_work_s=scheduler.queued_work_s,
            roofline_decode=self._roofline.decode if self._roofline is not None else 0.0,
            roofline_prefill=self._roofline.prefill if self._roofline is not None else 0.0,
            spec_drafts=speculator.num_drafts if speculator is not None else 0,
            spec_accepted_by_position=_by_position(speculator),
            spec_unavailable=speculator.proposer.unavailable if speculator is not None else "",
            spec_draft_tokens=speculator.num_drafted if speculator is not None else 0,
            spec_accepted_tokens=speculator.num_accepted if speculator is not None else 0,
            adapters=self.adapters.slots.stats() if self.adapters is not None else [],
            host_blocks_total=host.pool.num_blocks if host is not None else 0,
            host_blocks_used=host.pool.num_used if host is not None else 0,
            host_blocks_cached=host.pool.num_cached if host is not None else 0,
            host_hits=scheduler.host_hits,
            host_blocks_stored=host.num_stored if host is not None else 0,
            host_blocks_fetched=host.num_fetched if host is not None else 0,
            num_preemptions_by_swap=scheduler.preemption.num_swapped,
        )

    def check_prompt(self, prompt: Sequence[int], room: int = 1) -> None:
        """Raise `InvalidRequestError` for a prompt that cannot run with `room` more tokens."""
        check_prompt(prompt, self.model, room)

    def _adapter_manager(self) -> AdapterManager:
        if self.adapters is None:
            raise InvalidRequestError("this engine runs without adapters; start it with enable_lora", "lora_name")
        return self.adapters

    def _adapter(self, name: str) -> LoadedAdapter | None:
        """The adapter a request names, None for the base model. Raises `InvalidRequestError`."""
        if not name:
            return None
        if self.adapters is None:
            raise InvalidRequestError(f"model: adapter {name!r} is not loaded", "model")
        return self.adapters.slots.find(name)

    def _check_id(self, request_id: str) -> None:
        if self.scheduler.get(request_id) is not None or request_id in self._embeddings or request_id in self._grammars:
            raise InvalidRequestError(f"request id {request_id!r} is in use by a request still running", "request_id")

    def _check_room(self, num_queued: int) -> None:
        """The queues beside the scheduler's have its bound too."""
        if num_queued >= self._config.max_queued_requests:
            retry_after_s = self.scheduler.retry_after_s
            raise QueueFullError(
                f"the waiting queue is full ({num_queued} requests); try again in {retry_after_s:.0f} s", retry_after_s
            )

    def _take_compiled(self) -> None:
        """Queue the sequences whose grammar is compiled; one that cannot be compiled ends with the reason."""
        for request, arrival_s, compiled in self._grammars.pop_compiled(wait_for_one=not self.scheduler.has_work):
            try:
                if isinstance(compiled, InvalidRequestError):
                    raise compiled
                self._enqueue(request, arrival_s, compiled)
            except (InvalidRequestError, QueueFullError) as error:
                self._outputs.append(rejection(request.request_id, error))

    def _compute(self, batch: Batch) -> None:
        started = self._clock()
        parts, failed = run_isolated(self._runner, batch, self.pool)
        for seq, error in failed:
            self._fail(seq, RequestFailedError(f"the model could not compute this request: {error}"))
        for part, logits in parts:
            self._sample(part, logits)
        if not failed:
            seconds = self._clock() - started
            self.scheduler.observe(batch, seconds)
            if self._roofline is not None:
                self._roofline.observe(batch.load, batch.num_logits, seconds)

    def _sample(self, part: Batch, logits: torch.Tensor) -> None:
        """Choose and append the next tokens of the sequences whose last position a step has reached."""
        rows: list[int] = []
        states: list[SamplerState] = []
        ahead: list[int] = []
        sampled_seqs: list[Seq] = []
        end_row = 0
        for seq, piece in zip(part.sequences, part.slices, strict=True):
            end_row += piece.num_logits
            if seq.wants_prompt_logprobs:
                self._add_prompt_logprobs(seq, piece, logits[end_row - piece.num_logits : end_row])
            if seq.drafted:
                count = piece.num_logits
                rows.extend(range(end_row - count, end_row))
                states.extend([seq.sampler] * count)
                ahead.extend(range(count))
            else:
                self.scheduler.advance(seq, len(piece.token_ids))
                if not piece.num_logits or seq.num_computed != len(seq.tokens):
                    continue
                rows.append(end_row - 1)
                states.append(seq.sampler)
                ahead.append(0)
            sampled_seqs.append(seq)
        if not rows:
            return
        sampled = self._sampler.sample(logits if len(rows) == end_row else logits[rows], states, ahead)
        row = 0
        for seq in sampled_seqs:
            count = 1 + len(seq.drafted)
            entries = sampled.logprobs[row : row + count] if sampled.logprobs is not None else [None] * count
            self._append_verified(seq, sampled.token_ids[row : row + count], entries)
            row += count

    def _append_verified(self, seq: Seq, token_ids: list[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        """Append what the model chose: every guess it agrees with, and the first token of its own.

        The model chooses after a guess exactly as it would without guessing, from the same logits with the same
        draw, so a guess is kept just when it is that choice: the output is the same, token for token, with and
        without speculation, for greedy and for random sequences.
        """
        drafted = seq.drafted
        if drafted:
            num_accepted = 0
            while num_accepted < len(drafted) and token_ids[num_accepted] == drafted[num_accepted]:
                num_accepted += 1
            seq.drafted = []
            if self.scheduler.speculator is not None:
                self.scheduler.speculator.observe(seq, len(drafted), num_accepted)
            for token, entry in zip(token_ids[:num_accepted], logprobs, strict=False):
                self._append(seq, token, entry)
                if seq.state is not SequenceState.RUNNING:
                    return
            self.scheduler.advance(seq, 1 + num_accepted)
            token_ids, logprobs = token_ids[num_accepted:], logprobs[num_accepted:]
        self._append(seq, token_ids[0], logprobs[0])

    def _append(self, seq: Seq, token: int, logprobs: TokenLogprobs | None) -> None:
        """Add a sampled token, report it, and end the sequence if it is the last one."""
        if token < 0:
            self._fail(seq, seq.sampler.failure or _no_token(seq, token))
            return
        constraint = seq.sampler.constraint
        if constraint is not None and not self._follow(seq, constraint, token):
            return
        seq.tokens.append(token)
        self._generation_tokens += 1
        self.scheduler.fairness.charge_output(seq.tenant)
        reason = self._reason_to_end(seq, token)
        is_first = seq.num_output_tokens == seq.num_resumed + 1
        if reason is None and not is_first and logprobs is None:
            self._outputs.append(SequenceOutput(request_id=seq.request_id, token_ids=[token]))
            return
        prompt_logprobs = None
        if is_first:
            self._prompt_tokens += seq.num_prompt_tokens
            if seq.wants_prompt_logprobs:
                prompt_logprobs, seq.prompt_logprobs = seq.prompt_logprobs, []
                seq.wants_prompt_logprobs = False
        if reason is not None:
            self._end(seq, reason)
        self._outputs.append(
            SequenceOutput(
                request_id=seq.request_id,
                token_ids=[token],
                logprobs=None if logprobs is None else [logprobs],
                prompt_logprobs=prompt_logprobs,
                finish_reason=reason,
                stop_token_id=token if token in seq.end_token_ids and reason is FinishReason.STOP else None,
                num_cached_tokens=seq.num_cached_tokens,
                num_preemptions=seq.num_preemptions,
                queue_time_s=(seq.first_scheduled_s or seq.arrival_s) - seq.arrival_s,
            )
        )

    def _reason_to_end(self, seq: Seq, token: int) -> FinishReason | None:
        """Why `token`, just appended, is the last one of its sequence; None if it is not."""
        num_output = len(seq.tokens) - seq.num_prompt_tokens
        if token in seq.end_token_ids and num_output >= seq.sampling.min_tokens:
            return FinishReason.STOP
        constraint = seq.sampler.constraint
        if constraint is not None and constraint.is_complete:
            return FinishReason.STOP
        if num_output >= seq.sampling.max_tokens or len(seq.tokens) >= self._max_model_len:
            return FinishReason.LENGTH
        return None

    def _follow(self, seq: Seq, constraint: TokenConstraint, token: int) -> bool:
        """Move a constraint past a token; a grammar that breaks down ends its request."""
        try:
            constraint.accept(token)
        except InvalidRequestError as error:
            self._fail(seq, error)
            return False
        return True

    def _add_prompt_logprobs(self, seq: Seq, piece: SequenceSlice, logits: torch.Tensor) -> None:
        """Row j of a slice's logits predicts position `start + j + 1`; only prompt positions are reported."""
        if piece.start == 0:
            seq.prompt_logprobs = [None]
        targets = seq.tokens[piece.start + 1 : min(piece.start + len(piece.token_ids) + 1, seq.num_prompt_tokens)]
        if targets:
            num_top = [seq.sampling.prompt_logprobs or 0] * len(targets)
            seq.prompt_logprobs.extend(token_logprobs(logits[: len(targets)], targets, num_top))

    def _finish(self, seq: Seq, reason: FinishReason, error: OctavoError | None = None) -> None:
        """End a sequence without a new token. The caller gets an `InvalidRequestError` as such."""
        self._end(seq, reason)
        by_request = isinstance(error, InvalidRequestError)
        self._outputs.append(
            SequenceOutput(
                request_id=seq.request_id,
                token_ids=[],
                finish_reason=reason,
                num_cached_tokens=seq.num_cached_tokens,
                num_preemptions=seq.num_preemptions,
                error=None if error is None else str(error),
                error_kind=InvalidRequestError.__name__ if by_request else None,
                error_param=error.param if isinstance(error, InvalidRequestError) else None,
            )
        )

    def _fail(self, seq: Seq, error: OctavoError) -> None:
        """End a sequence whose computation went wrong; nothing it wrote to the cache is given to others."""
        self.scheduler.blocks.distrust(seq.table)
        self._finish(seq, FinishReason.ERROR, error)

    def _end(self, seq: Seq, reason: FinishReason) -> None:
        self.scheduler.finish(seq)
        if self.adapters is not None and seq.adapter is not None:
            self.adapters.end(seq.adapter)
        self._finished[reason.value] += 1


def _no_token(seq: Seq, failure: int) -> OctavoError:
    """Why the sampler found no token for a sequence."""
    if failure != ALL_EXCLUDED:
        return RequestFailedError(_FAILURES[failure])
    param = next((name for field, name in _EXCLUDING.items() if getattr(seq.sampling, field)), "min_tokens")
    return InvalidRequestError(f"{param}: {_FAILURES[failure]}", param)


def _by_position(speculator: Speculator | None) -> dict[str, int]:
    if speculator is None:
        return {}
    return {str(position): speculator.accepted_by_position[position] for position in range(speculator.max_tokens)}


def effective_max_model_len(model: ModelInfo) -> int:
    """The longest sequence that can run: the model's context, or the whole KV cache if that is smaller."""
    if model.task != "generate":
        return model.max_model_len
    return min(model.max_model_len, model.kv_blocks_total * model.kv_block_size)
