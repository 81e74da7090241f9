"""From a request's fields to the engine's `SamplingParams`."""

from __future__ import annotations

from octavo_engine.errors import InvalidRequestError
from octavo_engine.sampling_params import SamplingParams, StructuredOutput
from octavo_engine.tokenizer.interface import Tokenizer
from octavo_server.errors import bad_request, from_engine_error
from octavo_server.openai.request_types import SamplingFields
from octavo_server.served_model import ServedModel


def sampling_params(
    fields: SamplingFields,
    served: ServedModel,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    structured: StructuredOutput | None = None,
) -> SamplingParams:
    """Validated parameters of one sequence; raises a 400 naming the field. Tokenizes `bad_words`: call off the loop.

    Fields left out get the checkpoint's own defaults, then the protocol's.
    """
    if fields.spaces_between_special_tokens and fields.skip_special_tokens is False:
        raise bad_request(
            "spaces_between_special_tokens: special tokens are written as they are; set it to false",
            "spaces_between_special_tokens",
        )
    defaults = served.sampling_defaults
    stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
    top_k = int(_default(fields.top_k, defaults.top_k, 0))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=fields.min_tokens or 0,
        temperature=_default(fields.temperature, defaults.temperature, 1.0),
        top_p=_default(fields.top_p, defaults.top_p, 1.0),
        top_k=0 if top_k == -1 else top_k,
        min_p=_default(fields.min_p, defaults.min_p, 0.0),
        typical_p=_default(fields.typical_p, None, 1.0),
        repetition_penalty=_default(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=_default(fields.presence_penalty, None, 0.0),
        frequency_penalty=_default(fields.frequency_penalty, None, 0.0),
        logit_bias=fields.logit_bias or None,
        allowed_token_ids=fields.allowed_token_ids,
        bad_words_ids=_bad_words_ids(fields.bad_words or [], served.tokenizer) or None,
        seed=fields.seed,
        stop=stop,
        stop_token_ids=tuple(fields.stop_token_ids or ()),
        include_stop_str_in_output=bool(fields.include_stop_str_in_output),
        ignore_eos=bool(fields.ignore_eos),
        skip_special_tokens=fields.skip_special_tokens is not False,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        structured=structured,
    )
    try:
        params.validate(served.info.vocab_size)
    except InvalidRequestError as error:
        raise from_engine_error(error) from None
    return params


def _default(value: float | None, checkpoint: float | None, protocol: float) -> float:
    if value is not None:
        return value
    return protocol if checkpoint is None else checkpoint


def _bad_words_ids(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Each word as it starts a text and as it follows a space: most vocabularies write the two differently."""
    sequences: list[list[int]] = []
    for position, word in enumerate(words):
        if not word.strip():
            raise bad_request(f"bad_words[{position}]: must hold a visible character", "bad_words")
        for text in (word, f" {word.lstrip()}"):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids and ids not in sequences:
                sequences.append(ids)
    return sequences
