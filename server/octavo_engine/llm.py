"""The engine as a Python object: `LLM(model).generate(prompts)`, without a server or a second process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import msgspec

from octavo_engine.beam_search import Beam, BeamSearchParams, NextTokens, search
from octavo_engine.config import EngineConfig
from octavo_engine.detokenizer import IncrementalDetokenizer
from octavo_engine.errors import InvalidRequestError, RequestFailedError
from octavo_engine.messages import (
    AddRequest,
    EmbedRequest,
    EngineStats,
    FinishReason,
    LoadProgress,
    ModelInfo,
    SequenceOutput,
    TokenLogprobs,
)
from octavo_engine.offline import OfflineEngine, OneEngine
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.startup import LoadRunner, build_engine
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_engine.tokenizer.load import load_tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]  # the last as vLLM has them: `prompt` or `prompt_token_ids`
Message = Mapping[str, Any]


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One generated sequence. `stop_reason` is the stop string or entry of `stop_token_ids` that ended it, if any."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and its `n` completions."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class LLM:
    """An engine in this process, for scripts, notebooks and tests; `data_parallel_size` of them in child processes.

    Settings are those of `EngineConfig`, given by name: `LLM("hf://org/model", dtype="float32")`. Prompts of one call
    run together, batched by the same scheduler that serves requests. Child processes end with `close`, at the end of a
    `with` block, or with this process. Raises `ConfigError` and `ModelLoadError`.
    """

    def __init__(
        self,
        model: str,
        *,
        on_progress: Callable[[LoadProgress], None] | None = None,
        load: LoadRunner | None = None,
        tokenizer: Tokenizer | None = None,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig(model=model, **settings)
        self._engine = _engine(self.config, on_progress or _ignore_progress, load)
        self._tokenizer = tokenizer
        self._num_requests = 0

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines that run in child processes; nothing can be asked of them afterwards."""
        self._engine.close()

    @property
    def model(self) -> ModelInfo:
        return self._engine.model

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded when it is first needed."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model.path)
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | Sequence[str] = "",
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt (text or token ids), in the given order; `on_output` hears of each as it ends.

        `adapter`: the loaded adapter to answer with, for all prompts or for each; empty is the base model.
        Raises `InvalidRequestError` before anything runs if a prompt or its sampling is impossible. A prompt that
        fails while it runs has the finish reason `error`.
        """
        items = _prompt_list(prompts)
        params = _sampling_list(sampling, len(items))
        adapters = [adapter] * len(items) if isinstance(adapter, str) else list(adapter)
        if len(adapters) != len(items):
            raise InvalidRequestError(f"adapter: got {len(adapters)} names for {len(items)} prompts", "adapter")
        collectors = [self._collector(*each) for each in zip(items, params, adapters, strict=True)]
        return self._run(collectors, on_output)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered with the model's own chat template."""
        single = bool(conversations) and isinstance(conversations[0], Mapping)
        batch: Any = [conversations] if single else conversations
        prompts = [
            self.tokenizer.encode(
                self.tokenizer.apply_chat_template(messages, tools=tools, template_kwargs=template_kwargs),
                add_special_tokens=False,
            )
            for messages in batch
        ]
        return self.generate(prompts, sampling)

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> list[list[float]]:
        """Pool each text into a vector; raises `RequestFailedError` for one that cannot be computed."""
        names = []
        found: dict[str, SequenceOutput] = {}
        try:
            for item in _prompt_list(prompts):
                name = self._next_name()
                names.append(name)
                self._engine.add_embedding(EmbedRequest(request_id=name, prompt_token_ids=self._encode(item)))
            while self._engine.has_work:
                found.update((output.request_id, output) for output in self._engine.step())
        finally:
            self._engine.abort([name for name in names if name not in found])
        vectors = []
        for name in names:
            if found[name].embedding is None:
                raise RequestFailedError(found[name].error or "the engine returned no vector for this text")
            vectors.append(found[name].embedding or [])
        return vectors

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[RequestOutput]:
        """The `beam_width` most likely continuations of each prompt, best first."""
        params.validate()
        results = []
        for item in _prompt_list(prompts):
            collector = self._collector(item, SamplingParams())
            self._engine.check_prompt(collector.prompt_token_ids, room=params.max_tokens)
            beams = search(self._extender(collector.prompt_token_ids, params), params, self._eos())
            outputs = [
                Completion(
                    index=index,
                    text=self.tokenizer.decode(beam.token_ids),
                    token_ids=list(beam.token_ids),
                    finish_reason=FinishReason.STOP if beam.token_ids[-1] in self._eos() else FinishReason.LENGTH,
                    cumulative_logprob=beam.cumulative_logprob,
                )
                for index, beam in enumerate(beams)
            ]
            results.append(
                RequestOutput(prompt=collector.prompt, prompt_token_ids=collector.prompt_token_ids, outputs=outputs)
            )
        return results

    def _eos(self) -> frozenset[int]:
        return frozenset(self.model.eos_token_ids)

    def _extender(self, prompt: list[int], params: BeamSearchParams) -> NextTokens:
        """One step of all beams together; what they share comes from the prefix cache."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2 * params.beam_width, ignore_eos=True)

        def next_tokens(beams: Sequence[Beam]) -> list[TokenLogprobs]:
            results = self.generate([[*prompt, *beam.token_ids] for beam in beams], sampling)
            entries = [result.outputs[0].logprobs for result in results]
            failed = [result.outputs[0].error for result in results if not result.outputs[0].logprobs]
            if failed:
                raise RequestFailedError(failed[0] or "the engine returned no log-probabilities")
            return [entry[0] for entry in entries if entry]

        return next_tokens

    def _collector(self, prompt: str | list[int], sampling: SamplingParams, adapter: str = "") -> _Collector:
        sampling.validate(self.model.vocab_size)
        token_ids = self._encode(prompt)
        self._engine.check_prompt(token_ids)
        return _Collector(prompt if isinstance(prompt, str) else None, token_ids, sampling, adapter)

    def _run(
        self, collectors: list[_Collector], on_output: Callable[[RequestOutput], None] | None
    ) -> list[RequestOutput]:
        owners: dict[str, tuple[_Collector, _Sequence]] = {}
        queued = [(collector, index) for collector in collectors for index in range(collector.sampling.n)]
        queued.reverse()
        try:
            while queued or self._engine.has_work:
                self._feed(queued, owners)
                for output in self._engine.step():
                    owner = owners.get(output.request_id)
                    if owner is not None and self._take(*owner, output) and on_output is not None:
                        on_output(owner[0].result())
        finally:
            self._engine.abort([name for name, (_, seq) in owners.items() if seq.completion is None])
        return [collector.result() for collector in collectors]

    def _feed(self, queued: list[tuple[_Collector, int]], owners: dict[str, tuple[_Collector, _Sequence]]) -> None:
        while queued and self._engine.can_take(len(queued[-1][0].prompt_token_ids)):
            collector, index = queued.pop()
            name = self._next_name()
            sampling = collector.sampling
            if sampling.seed is not None and index:
                sampling = msgspec.structs.replace(sampling, seed=sampling.seed + index)
            self._engine.add(
                AddRequest(
                    request_id=name,
                    prompt_token_ids=collector.prompt_token_ids,
                    sampling=sampling,
                    adapter=collector.adapter,
                )
            )
            owners[name] = (collector, collector.open(index, name, self.tokenizer))

    def _take(self, collector: _Collector, seq: _Sequence, output: SequenceOutput) -> bool:
        """Add an output to its sequence; True when that completed the whole request."""
        if seq.completion is not None:
            return False
        if seq.take(output):
            self._engine.abort([seq.name])
        if output.prompt_logprobs is not None and collector.prompt_logprobs is None:
            collector.prompt_logprobs = output.prompt_logprobs
        return collector.is_done

    def _encode(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _next_name(self) -> str:
        self._num_requests += 1
        return f"offline-{self._num_requests}"


class _Sequence:
    """One completion while it grows."""

    def __init__(self, index: int, name: str, sampling: SamplingParams, tokenizer: Tokenizer) -> None:
        self.name = name
        self.completion: Completion | None = None
        self._index = index
        self._detokenizer = IncrementalDetokenizer(tokenizer, sampling)
        self._stop_token_ids = sampling.stop_token_ids
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._num_cached_tokens = 0

    def take(self, output: SequenceOutput) -> bool:
        """Add new tokens; True if a stop string ended the sequence before the engine did."""
        delta = self._detokenizer.push(output.token_ids, output.finish_reason is not None)
        self._text.append(delta.text)
        self._token_ids.extend(output.token_ids[: delta.num_tokens])
        self._logprobs.extend((output.logprobs or [])[: delta.num_tokens])
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        if delta.stop_reason is not None:
            self._complete(FinishReason.STOP, delta.stop_reason, output)
        elif output.finish_reason is not None:
            named = output.stop_token_id if output.stop_token_id in self._stop_token_ids else None
            self._complete(output.finish_reason, named, output)
        return delta.stop_reason is not None and output.finish_reason is None

    def _complete(self, reason: FinishReason, stop_reason: str | int | None, output: SequenceOutput) -> None:
        self.completion = Completion(
            index=self._index,
            text="".join(self._text),
            token_ids=self._token_ids,
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=self._logprobs or None,
            num_cached_tokens=self._num_cached_tokens,
            error=output.error,
        )


class _Collector:
    """One prompt while its completions grow."""

    def __init__(self, prompt: str | None, prompt_token_ids: list[int], sampling: SamplingParams, adapter: str) -> None:
        self.prompt = prompt
        self.adapter = adapter
        self.prompt_token_ids = prompt_token_ids
        self.sampling = sampling
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._sequences: list[_Sequence] = []

    @property
    def is_done(self) -> bool:
        return len(self._sequences) == self.sampling.n and all(seq.completion is not None for seq in self._sequences)

    def open(self, index: int, name: str, tokenizer: Tokenizer) -> _Sequence:
        self._sequences.append(_Sequence(index, name, self.sampling, tokenizer))
        return self._sequences[-1]

    def result(self) -> RequestOutput:
        return RequestOutput(
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[seq.completion for seq in self._sequences if seq.completion is not None],
            prompt_logprobs=self.prompt_logprobs,
        )


def _engine(
    config: EngineConfig, on_progress: Callable[[LoadProgress], None], load: LoadRunner | None
) -> OfflineEngine:
    if config.data_parallel_size == 1:
        return OneEngine(build_engine(config, on_progress, load), config)
    from octavo_engine.process.offline import OfflineEngines

    return OfflineEngines(config, on_progress, load)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    if isinstance(prompts, str | Mapping) or (len(prompts) and _is_token(prompts[0])):
        return [_plain(prompts)]
    return [_plain(prompt) for prompt in prompts]


def _is_token(value: object) -> bool:
    return hasattr(value, "__index__") and not hasattr(value, "__len__")  # arrays of one element have both


def _plain(prompt: object) -> str | list[int]:
    """A text or token ids, of any form that a prompt may have."""
    found: object = prompt
    if isinstance(prompt, Mapping):
        found = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(found, str):
        return found
    try:
        return [index(token) for token in found]  # type: ignore[attr-defined]
    except TypeError:
        raise InvalidRequestError(
            "a prompt is a text, a list of token ids, or a dictionary with `prompt` or `prompt_token_ids`, "
            f"not {type(prompt).__name__}",
            "prompt",
        ) from None


def _sampling_list(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * count
    if len(sampling) != count:
        raise InvalidRequestError(f"sampling: got {len(sampling)} settings for {count} prompts", "sampling")
    return list(sampling)


def _ignore_progress(_progress: LoadProgress) -> None:
    return
