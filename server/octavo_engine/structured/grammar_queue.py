"""Requests whose grammar is being compiled, beside the engine's loop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from octavo_engine.errors import InvalidRequestError
from octavo_engine.messages import AddRequest
from octavo_engine.sampler.state import TokenConstraint
from octavo_engine.sampling_params import StructuredOutput
from octavo_engine.structured.grammar import GrammarCompiler
from octavo_engine.tokenizer.interface import Tokenizer

IDLE_WAIT_S = 0.01


@dataclass(frozen=True, slots=True)
class _Pending:
    request: AddRequest
    arrival_s: float
    constraint: Future[TokenConstraint]


class GrammarQueue:
    """Compiles in one thread, in order of arrival; llguidance lets go of the interpreter lock meanwhile.

    The tokenizer is loaded with the first such request: an engine that never sees one needs none.
    """

    def __init__(self, load_tokenizer: Callable[[], Tokenizer], vocab_size: int, end_token_ids: frozenset[int]) -> None:
        self._load_tokenizer = load_tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = end_token_ids
        self._compiler: GrammarCompiler | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._pending: dict[str, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    def add(self, request: AddRequest, structured: StructuredOutput, arrival_s: float) -> None:
        """Begin to compile what a request asks for."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        compiling = self._executor.submit(self._compile, structured)
        self._pending[request.request_id] = _Pending(request, arrival_s, compiling)

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        pending = self._pending.pop(request_id, None)
        if pending is not None:
            pending.constraint.cancel()

    def pop_compiled(
        self, *, wait_for_one: bool
    ) -> list[tuple[AddRequest, float, TokenConstraint | InvalidRequestError]]:
        """Requests whose grammar is ready or wrong; `wait_for_one` waits a moment, for when nothing else runs."""
        if wait_for_one:
            wait([item.constraint for item in self._pending.values()], IDLE_WAIT_S, FIRST_COMPLETED)
        ready = [item for item in self._pending.values() if item.constraint.done()]
        compiled: list[tuple[AddRequest, float, TokenConstraint | InvalidRequestError]] = []
        for item in ready:
            del self._pending[item.request.request_id]
            error = item.constraint.exception()
            if error is None:
                compiled.append((item.request, item.arrival_s, item.constraint.result()))
            elif isinstance(error, InvalidRequestError):
                compiled.append((item.request, item.arrival_s, error))
            else:
                reason = InvalidRequestError(f"structured: the grammar cannot be compiled: {error}", "structured")
                compiled.append((item.request, item.arrival_s, reason))
        return compiled

    def _compile(self, structured: StructuredOutput) -> TokenConstraint:
        if self._compiler is None:
            self._compiler = GrammarCompiler(self._load_tokenizer(), self._vocab_size, self._end_token_ids)
        return self._compiler.compile(structured)
