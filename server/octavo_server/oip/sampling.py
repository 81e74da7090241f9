"""The JSON of the `sampling_parameters` tensor: the fields of completions that mean something here."""

from __future__ import annotations

from octavo_server.openai.refused_fields import HINTS, REFUSED_FIELDS
from octavo_server.openai.request_types import MaxTokens, SamplingFields
from octavo_server.parsing import Refused, parse


class TritonSampling(SamplingFields, frozen=True, kw_only=True):
    """What one text's sampling may be told."""

    max_tokens: MaxTokens | None = None


_OWN_WAYS = {
    "best_of": Refused("use /v1/completions", off=("1",)),
    "echo": Refused("set the input exclude_input_in_output to false"),
    "logprobs": Refused("set the input return_logprobs; alternatives are not given"),
    "n": Refused("one text comes back for each request", off=("1",)),
    "octavo_resume": Refused("only streams of the OpenAI routes go on elsewhere"),
    "prompt_logprobs": Refused("use /v1/completions"),
    "request_id": Refused("use the request's own id"),
    "return_token_ids": Refused("use /v1/completions"),
    "return_tokens_as_token_ids": Refused("use /v1/completions"),
    "stream": Refused("an input of its own"),
    "stream_interval": Refused("use /v1/completions", off=("1",)),
    "stream_options": Refused("use the inputs return_num_input_tokens and return_num_output_tokens"),
}
REFUSED = {**REFUSED_FIELDS, **_OWN_WAYS}


def read_sampling(text: bytes) -> TritonSampling:
    """Raises a 400 naming the field that is wrong or cannot be honoured."""
    return parse(text or b"{}", TritonSampling, REFUSED, HINTS | {"model"}).request
