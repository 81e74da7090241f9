"""What a request that asks for beam search may ask for beside it."""

from __future__ import annotations

from collections.abc import Mapping

from octavo_server.errors import bad_request
from octavo_server.openai.refused_fields import REFUSED_FIELDS
from octavo_server.openai.request_types import BeamFields
from octavo_server.parsing import Refused

# Routes that search honour these.
REFUSED_BESIDE_BEAMS: Mapping[str, Refused] = {
    name: refusal for name, refusal in REFUSED_FIELDS.items() if name not in ("use_beam_search", "length_penalty")
}

# A search ranks by the model's own probabilities: what changes or reports them token by token has no meaning in it.
_MEANINGLESS = (
    *("top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "allowed_token_ids", "bad_words", "stop", "stop_token_ids", "min_tokens", "seed"),
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("prompt_logprobs", "logprobs", "echo", "tools", "best_of", "octavo_resume"),
)


def beam_length_penalty(request: BeamFields) -> float | None:
    """The exponent that lengths are weighed with, or None for a request that does not search. Raises a 400."""
    if not request.use_beam_search:
        if request.length_penalty not in (None, 1.0):
            raise bad_request("length_penalty: only allowed with use_beam_search", "length_penalty")
        return None
    if request.stream:
        raise bad_request("use_beam_search: cannot be streamed; the best beam is known at the end", "use_beam_search")
    if request.temperature not in (None, 0.0, 1.0):
        raise bad_request("temperature: has no meaning with use_beam_search; leave it out", "temperature")
    for name in _MEANINGLESS:
        if getattr(request, name, None):
            raise bad_request(f"{name}: has no meaning with use_beam_search; leave it out", name)
    return 1.0 if request.length_penalty is None else request.length_penalty
