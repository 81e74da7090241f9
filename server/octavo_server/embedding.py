"""Texts to vectors: the one path every embedding face uses."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from octavo_engine.client import EngineClient
from octavo_engine.errors import OctavoError
from octavo_server.caller import Caller
from octavo_server.errors import ApiError, bad_request, from_engine_error
from octavo_server.served_model import ServedModel
from octavo_server.text_pool import TextPool

# Texts of one request on their way to the engine at a time; the engine batches them with everyone else's.
_CONCURRENCY = 64


@dataclass(frozen=True, slots=True)
class TextVector:
    """One text's vector and how many tokens it had."""

    values: list[float]
    num_tokens: int


class Embedder:
    """Vectors of one loaded model."""

    def __init__(self, engine: EngineClient, served: ServedModel, text: TextPool) -> None:
        self._engine = engine
        self._served = served
        self._text = text

    async def embed_texts(
        self,
        texts: Sequence[str | list[int]],
        caller: Caller,
        *,
        param: str,
        truncate: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[TextVector]:
        """A vector for each text or list of token ids, in order; raises `ApiError` that names `param`."""
        if self._served.info.task != "embed":
            raise bad_request(
                f"model: {self._served.name} generates text and makes no embeddings; serve it with --task embed",
                "model",
            )
        many = len(texts) > 1
        prompts = await self._text.run(
            lambda: [
                self._token_ids(text, f"{param}[{i}]" if many else param, truncate, add_special_tokens)
                for i, text in enumerate(texts)
            ]
        )
        gate = asyncio.Semaphore(_CONCURRENCY)

        async def one(token_ids: list[int]) -> TextVector:
            async with gate:
                return await self._embed(token_ids, caller)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(token_ids)) for token_ids in prompts]
        except* ApiError as errors:
            raise _first(errors) from None
        return [task.result() for task in tasks]

    async def _embed(self, token_ids: list[int], caller: Caller) -> TextVector:
        try:
            output = await self._engine.embed(
                request_id=f"embd-{uuid.uuid4().hex}", prompt_token_ids=token_ids, tenant=caller.tenant
            )
        except OctavoError as error:
            raise from_engine_error(error) from error
        caller.consumed.prompt_tokens += len(token_ids)
        return TextVector(output.embedding or [], len(token_ids))

    def _token_ids(
        self, text: str | list[int], param: str, truncate: int | None, add_special_tokens: bool
    ) -> list[int]:
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
