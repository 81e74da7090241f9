"""Whether a prompt can run at all, and whether an output can go on."""

from __future__ import annotations

from collections.abc import Sequence

from octavo_engine.errors import InvalidRequestError
from octavo_engine.messages import ModelInfo
from octavo_engine.sampling_params import SamplingParams


def check_prompt(prompt: Sequence[int], model: ModelInfo, room: int) -> None:
    """Raise `InvalidRequestError` unless the prompt has tokens of this vocabulary and `room` more fit the context."""
    longest = model.max_model_len - room
    if not prompt:
        raise InvalidRequestError("the prompt is empty: at least one token is needed", "prompt")
    if len(prompt) > longest:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens, and at most {longest} fit: the model's context here is "
            f"{model.max_model_len} tokens; shorten the prompt or raise max_model_len",
            "prompt",
        )
    if min(prompt) < 0 or max(prompt) >= model.vocab_size:
        raise InvalidRequestError(f"prompt token ids must be between 0 and {model.vocab_size - 1}", "prompt")


def check_resumed(prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams, model: ModelInfo) -> None:
    """Raise `InvalidRequestError` for an output, generated elsewhere, that cannot go on or has ended."""
    if not output:
        return
    check_prompt([*prompt, *output], model, room=1)
    ended = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        ended |= set(model.eos_token_ids)
    if len(output) >= sampling.max_tokens or (output[-1] in ended and len(output) >= sampling.min_tokens):
        raise InvalidRequestError("output_token_ids: the sequence has already ended with them", "output_token_ids")
