"""Bodies of the OpenAI routes. Ranges that concern sampling are checked by `SamplingParams`, sizes here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from octavo_server.limits import LIMITS

Identifier = Annotated[str, Meta(max_length=LIMITS.identifier_chars)]
ModelName = Annotated[str, Meta(max_length=LIMITS.model_name_chars)]
TokenId = Annotated[int, Meta(ge=0, le=LIMITS.prompt_token_id)]
MaxTokens = Annotated[int, Meta(ge=1, le=LIMITS.max_tokens)]
Size = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
JsonObject = dict[str, Any]


class StreamOptions(Struct, frozen=True):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Struct, frozen=True):
    """A named schema of `response_format`."""

    name: Annotated[str, Meta(max_length=LIMITS.identifier_chars)] = "response"
    schema: JsonObject | bool = True
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct, frozen=True):
    """`text`, `json_object` or `json_schema`."""

    type: str
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's way to constrain the output; exactly one of the first five is set, the others say how JSON is spaced."""

    json: str | JsonObject | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None


class Resume(Struct, frozen=True, forbid_unknown_fields=True):
    """An answer of another replica to go on with: what its chunks repeat, and the tokens it has told."""

    id: Identifier
    created: Annotated[int, Meta(ge=0, le=2**53)]
    token_ids: Annotated[list[TokenId], Meta(max_length=LIMITS.max_tokens)]


class SamplingFields(Struct, frozen=True, kw_only=True):
    """Fields that chat and completions share: OpenAI's and vLLM's."""

    model: ModelName | None = None
    n: Annotated[int, Meta(ge=1, le=LIMITS.n)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Size | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(max_length=LIMITS.allowed_token_ids)] | None = None
    bad_words: (
        Annotated[list[Annotated[str, Meta(max_length=LIMITS.bad_word_chars)]], Meta(max_length=LIMITS.bad_words)]
        | None
    ) = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=LIMITS.stop_token_ids)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=LIMITS.max_tokens)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=LIMITS.logprobs)] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=LIMITS.max_tokens)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Meta(ge=1, le=LIMITS.max_tokens)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | JsonObject | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Identifier | None = None
    priority: Annotated[int, Meta(ge=-LIMITS.priority, le=LIMITS.priority)] | None = None
    request_id: Annotated[str, Meta(pattern=r"^[\x21-\x7e]{1,128}$")] | None = None
    octavo_resume: Resume | None = None


class BeamFields(SamplingFields, frozen=True, kw_only=True):
    """What routes that can search take beside sampling."""

    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Meta(ge=-10.0, le=10.0)] | None = None


class CompletionRequest(BeamFields, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=0, le=LIMITS.max_tokens)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=LIMITS.best_of)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=LIMITS.logprobs)] | None = None


class ChatCompletionRequest(BeamFields, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[JsonObject], Meta(min_length=1, max_length=LIMITS.messages)]
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=LIMITS.logprobs)] | None = None
    tools: Annotated[list[JsonObject], Meta(max_length=LIMITS.tools)] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    documents: Annotated[list[JsonObject], Meta(max_length=LIMITS.content_parts)] | None = None
    reasoning_effort: Identifier | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[JsonObject, Meta(max_length=LIMITS.template_kwargs)] | None = None
