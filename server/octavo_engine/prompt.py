"""Whether a prompt can run at all."""

from __future__ import annotations

from collections.abc import Sequence

from octavo_engine.errors import InvalidRequestError
from octavo_engine.messages import ModelInfo


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
