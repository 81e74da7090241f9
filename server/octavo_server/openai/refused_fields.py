"""Fields of OpenAI's and vLLM's requests that are understood but not honoured, and fields that change nothing."""

from __future__ import annotations

from octavo_server.parsing import Refused

REFUSED_FIELDS: dict[str, Refused] = {
    "audio": Refused("audio output is not supported"),
    "chat_template": Refused("templates are set by whoever runs the server (--chat-template)"),
    "early_stopping": Refused("searches end when no beam can get better"),
    "ec_transfer_params": Refused("this server takes text only"),
    "function_call": Refused("replaced by tool_choice"),
    "functions": Refused("replaced by tools"),
    "guided_decoding_backend": Refused("there is one backend"),
    "kv_transfer_params": Refused("KV transfer between replicas is not supported"),
    "length_penalty": Refused("beam search is not supported here", off=("1", "1.0")),
    "logits_processors": Refused("code in requests is not supported"),
    "logprob_token_ids": Refused("not supported; use logprobs"),
    "media_io_kwargs": Refused("this server takes text only"),
    "mm_processor_kwargs": Refused("this server takes text only"),
    "modalities": Refused("this server writes text only", off=('["text"]',)),
    "prompt_embeds": Refused("tensors from clients are not accepted"),
    "repetition_detection": Refused("not supported"),
    "return_prompt_text": Refused("not supported; use return_token_ids and /detokenize"),
    "suffix": Refused("insertion is not supported"),
    "thinking_token_budget": Refused("not supported", off=("-1",)),
    "use_beam_search": Refused("beam search is not supported here"),
    "verbosity": Refused("not supported", off=('"medium"',)),
    "vllm_xargs": Refused("not supported"),
    "watermarking": Refused("not supported"),
    "web_search_options": Refused("web search is not supported"),
}

# Labels and hints: whatever they say, the answer is the same.
HINTS = frozenset({
    "metadata", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "session_id", "store", "user",
})  # fmt: skip
