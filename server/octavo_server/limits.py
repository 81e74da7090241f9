"""Every limit a request meets at this face, in one typed table."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.sampling_params import MAX_LOGPROBS, MAX_N


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds of what one request may ask for; each breach is a 4xx that names the field.

    Bounds on sampling values (temperature, penalties, stop strings) live in `SamplingParams.validate`.
    """

    head_bytes: int = 64 * 1024
    head_read_timeout_s: float = 60.0
    body_bytes: int = 8 * 1024 * 1024
    body_read_timeout_s: float = 60.0
    messages: int = 4_096
    content_parts: int = 256
    tools: int = 256
    prompts: int = 256
    sequences: int = 256  # prompts x n
    n: int = MAX_N
    best_of: int = MAX_N
    logprobs: int = MAX_LOGPROBS
    max_tokens: int = 2**31 - 1
    prompt_token_id: int = 2**31 - 1
    stop_token_ids: int = 256
    allowed_token_ids: int = 1_000_000
    bad_words: int = 256
    bad_word_chars: int = 1_024
    priority: int = 2**31 - 1
    identifier_chars: int = 128  # request ids, cache salts, user ids, model names of other fields
    metadata_entries: int = 64
    template_kwargs: int = 64
    model_name_chars: int = 512
    listed_names: int = 20  # in the error about a model that is not served
    embed_inputs: int = 2_048
    detokenize_tokens: int = 4_000_000
    stored_files: int = 1_000  # of one tenant
    open_batches: int = 100  # of one tenant
    batch_lines: int = 50_000
    error_message_chars: int = 2_000
    characters_per_token: int = 256  # no prompt of more characters than this times the context can fit
    json_depth: int = 64


LIMITS = Limits()
