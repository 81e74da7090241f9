"""What comes in: requests are checked, completed with what the engine decides, and queued."""

from __future__ import annotations

from collections.abc import Callable

from octavo_engine.config import EngineConfig
from octavo_engine.embedding import EmbeddingQueue
from octavo_engine.errors import InvalidRequestError, QueueFullError
from octavo_engine.lora.manager import AdapterManager
from octavo_engine.lora.slots import LoadedAdapter
from octavo_engine.messages import AddRequest, EmbedRequest, ModelInfo, SequenceOutput
from octavo_engine.prompt import check_prompt, check_resumed
from octavo_engine.rejection import rejection
from octavo_engine.runner.interface import ModelRunner
from octavo_engine.sampler.noise import request_seed
from octavo_engine.sampler.state import TokenConstraint
from octavo_engine.scheduler.scheduler import Scheduler
from octavo_engine.scheduler.sequence import Sequence
from octavo_engine.structured.grammar_queue import GrammarQueue
from octavo_engine.tokenizer.interface import Tokenizer


class Intake:
    """The way into the scheduler's queue, and the two queues beside it: texts to pool and grammars to compile."""

    def __init__(
        self,
        runner: ModelRunner,
        model: ModelInfo,
        config: EngineConfig,
        scheduler: Scheduler,
        adapters: AdapterManager | None,
        tokenizer: Callable[[], Tokenizer],
    ) -> None:
        self._model = model
        self._config = config
        self._scheduler = scheduler
        self._adapters = adapters
        self._eos = frozenset(model.eos_token_ids)
        self.num_taken = 0
        self.embeddings = EmbeddingQueue(runner, scheduler.limits.max_num_batched_tokens)
        self.grammars = GrammarQueue(tokenizer, model.vocab_size, self._eos)

    def add(self, request: AddRequest, now: float) -> None:
        """Queue a sequence. Raises `InvalidRequestError` or `QueueFullError`."""
        self.num_taken += 1
        self._check_id(request.request_id)
        check_prompt(request.prompt_token_ids, self._model, room=1)
        request.sampling.validate(self._model.vocab_size)
        check_resumed(request.prompt_token_ids, request.output_token_ids, request.sampling, self._model)
        if self._model.task != "generate":
            raise InvalidRequestError(
                f"{self._model.name} is served to {self._model.task} and generates no text", "model"
            )
        self._adapter(request.adapter)
        structured = request.sampling.structured
        if structured is None:
            self._enqueue(request, now, None)
        else:
            self._check_room(len(self.grammars))
            self.grammars.add(request, structured, now)

    def add_embedding(self, request: EmbedRequest) -> None:
        """Queue a text to pool. Raises `InvalidRequestError` or `QueueFullError`."""
        self.num_taken += 1
        self._check_id(request.request_id)
        check_prompt(request.prompt_token_ids, self._model, room=0)
        self._check_room(len(self.embeddings))
        self.embeddings.add(request)

    def remove(self, request_id: str) -> None:
        """Forget a request that has not reached the scheduler; unknown ids are ignored."""
        self.embeddings.remove(request_id)
        self.grammars.remove(request_id)

    def take_compiled(self) -> list[SequenceOutput]:
        """Queue the sequences whose grammar is compiled; one that cannot be compiled ends with the reason."""
        rejected = []
        for request, arrival_s, compiled in self.grammars.pop_compiled(wait_for_one=not self._scheduler.has_work):
            try:
                if isinstance(compiled, InvalidRequestError):
                    raise compiled
                self._enqueue(request, arrival_s, compiled)
            except (InvalidRequestError, QueueFullError) as error:
                rejected.append(rejection(request.request_id, error))
        return rejected

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
        seq = Sequence(
            request,
            arrival_s,
            seed=seed,
            end_token_ids=end_token_ids,
            constraint=constraint,
            adapter=adapter,
            max_model_len=self._model.max_model_len,
        )
        self._scheduler.add(seq)
        if self._adapters is not None and adapter is not None:
            self._adapters.slots.begin(adapter)

    def _adapter(self, name: str) -> LoadedAdapter | None:
        """The adapter a request names, None for the base model. Raises `InvalidRequestError`."""
        if not name:
            return None
        if self._adapters is None:
            raise InvalidRequestError(f"model: adapter {name!r} is not loaded", "model")
        return self._adapters.slots.find(name)

    def _check_id(self, request_id: str) -> None:
        queued = request_id in self.embeddings or request_id in self.grammars
        if queued or self._scheduler.get(request_id) is not None:
            raise InvalidRequestError(f"request id {request_id!r} is in use by a request still running", "request_id")

    def _check_room(self, num_queued: int) -> None:
        """The queues beside the scheduler's have its bound too."""
        if num_queued >= self._config.max_queued_requests:
            retry_after_s = self._scheduler.retry_after_s
            raise QueueFullError(
                f"the waiting queue is full ({num_queued} requests); try again in {retry_after_s:.0f} s", retry_after_s
            )
