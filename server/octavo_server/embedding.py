"""Texts to vectors or scores: the one path every embedding, ranking and classifying face uses."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from octavo_engine.client import EngineClient
from octavo_engine.errors import OctavoError
from octavo_server.caller import Caller
from octavo_server.errors import ApiError, bad_request, from_engine_error
from octavo_server.judging import judge_prompt
from octavo_server.served_model import ServedModel

# Texts of one request on their way to the engine at a time; the engine batches them with everyone else's.
_CONCURRENCY = 64


@dataclass(frozen=True, slots=True)
class TextVector:
    """One text's vector, or a classifier's scores of it, and how many tokens it had."""

    values: list[float]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Prompt:
    """second_start: see `EmbedRequest`."""

    token_ids: list[int]
    second_start: int = 0


Prepare = Callable[[Callable[[], list[_Prompt]]], Awaitable[list[_Prompt]]]
"""`Replica.prepare`: runs text work off the event loop."""


class Embedder:
    """Vectors, or scores, of one loaded model."""

    def __init__(self, engine: EngineClient, served: ServedModel, prepare: Prepare) -> None:
        self._engine = engine
        self._served = served
        self._prepare = prepare

    async def embed_texts(
        self,
        texts: Sequence[str | list[int]],
        caller: Caller,
        *,
        param: str,
        truncate: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[TextVector]:
        """A vector, or a classifier's scores, for each text or list of token ids, in order.

        Raises `ApiError` that names `param`.
        """
        if self._served.info.task == "generate":
            raise bad_request(
                f"model: {self._served.name} generates text and makes no embeddings; serve it with --task embed",
                "model",
            )
        many = len(texts) > 1
        prompts = await self._prepare(
            lambda: [
                self._single(text, f"{param}[{i}]" if many else param, truncate, add_special_tokens)
                for i, text in enumerate(texts)
            ]
        )
        return await self._run(prompts, caller)

    async def score_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        caller: Caller,
        *,
        param: str,
        truncate: int | None,
        instruction: str | None,
    ) -> list[TextVector]:
        """One score for each pair of query and document; raises `ApiError` for a classifier of several labels."""
        info = self._served.info
        if len(info.labels) != 1:
            raise bad_request(
                f"model: {self._served.name} tells {len(info.labels)} labels apart and ranks nothing; use /classify",
                "model",
            )
        if instruction is not None and not info.judges_by_yes:
            raise bad_request("instruction: this model takes none", "instruction")
        prompts = await self._prepare(
            lambda: [
                self._pair(query, document, f"{param}[{i}]", truncate, instruction)
                for i, (query, document) in enumerate(pairs)
            ]
        )
        return await self._run(prompts, caller)

    async def _run(self, prompts: Sequence[_Prompt], caller: Caller) -> list[TextVector]:
        gate = asyncio.Semaphore(_CONCURRENCY)

        async def one(prompt: _Prompt) -> TextVector:
            async with gate:
                return await self._embed(prompt, caller)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(prompt)) for prompt in prompts]
        except* ApiError as errors:
            raise _first(errors) from None
        return [task.result() for task in tasks]

    async def _embed(self, prompt: _Prompt, caller: Caller) -> TextVector:
        try:
            output = await self._engine.embed(
                request_id=f"embd-{uuid.uuid4().hex}",
                prompt_token_ids=prompt.token_ids,
                second_start=prompt.second_start,
                tenant=caller.tenant,
            )
        except OctavoError as error:
            raise from_engine_error(error) from error
        caller.consumed.prompt_tokens += len(prompt.token_ids)
        return TextVector(output.embedding or [], len(prompt.token_ids))

    def _single(self, text: str | list[int], param: str, truncate: int | None, add_special_tokens: bool) -> _Prompt:
        served = self._served
        context = served.info.max_model_len
        if isinstance(text, str):
            if truncate is None:
                served.check_characters(text, param)
            ids = served.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:
            ids = text
            if ids and max(ids) >= served.info.vocab_size:
                raise bad_request(f"{param}: {max(ids)} is no token of this model", param)
        if truncate is not None:
            ids = ids[: context if truncate == -1 else truncate]
        return _Prompt(self._checked(ids, param))

    def _pair(self, query: str, document: str, param: str, truncate: int | None, instruction: str | None) -> _Prompt:
        served = self._served
        limit = 0
        if truncate is None:
            served.check_characters(document, param)
        else:
            limit = served.info.max_model_len if truncate == -1 else min(truncate, served.info.max_model_len)
        if served.info.judges_by_yes:
            return _Prompt(self._checked(judge_prompt(served.tokenizer, query, document, instruction, limit), param))
        ids, second_start = served.tokenizer.encode_pair(query, document, max_length=limit)
        return _Prompt(self._checked(ids, param), second_start)

    def _checked(self, ids: list[int], param: str) -> list[int]:
        context = self._served.info.max_model_len
        if not ids:
            raise bad_request(f"{param}: holds no token", param)
        if len(ids) > context:
            raise bad_request(
                f"{param}: {len(ids)} tokens exceed this model's context of {context}; shorten it or set "
                "truncate_prompt_tokens to -1",
                param,
            )
        return ids


def _first(errors: BaseExceptionGroup[ApiError]) -> ApiError:
    """The first error of a (nested) group."""
    found = errors.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
