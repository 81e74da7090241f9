"""Answers that can go on at another replica when theirs dies: what is told along, and how they are taken up again.

A stream whose receiver asks for it (`x-octavo-resumable: 1`) tells the token ids of each chunk, and its head how many
prompt tokens there are. With these ids the same request continues elsewhere, exactly: sampling depends on the seed and
the position alone, penalties, stop strings, grammars and the parsing of thoughts are replayed over the tokens, and
nothing is said twice.
"""

from __future__ import annotations

import hashlib

from octavo_server.caller import RESUMABLE_HEADER, Caller
from octavo_server.errors import bad_request
from octavo_server.openai.request_types import ChatCompletionRequest, CompletionRequest

RESUMED_HEADER = "x-octavo-resumed"


def can_resume(request: ChatCompletionRequest | CompletionRequest, num_sequences: int) -> bool:
    """Whether a stream of this request could go on elsewhere: one sequence, and nothing that is told only once."""
    if not request.stream or num_sequences != 1 or request.stream_interval is not None:
        return False
    if isinstance(request, ChatCompletionRequest):
        return not request.tools  # a call's id is drawn at random
    return not request.echo and request.max_tokens != 0


def check_resume(request: ChatCompletionRequest | CompletionRequest, num_sequences: int) -> None:
    """Raise a 400 for an answer that cannot be taken up again."""
    if request.octavo_resume is not None and not can_resume(request, num_sequences):
        raise bad_request("octavo_resume: this request cannot be resumed", "octavo_resume")


def resume_headers(
    request: ChatCompletionRequest | CompletionRequest, caller: Caller, num_sequences: int, num_prompt_tokens: int
) -> dict[str, str]:
    """What the head of a stream says about going on elsewhere."""
    headers = {}
    if tells_tokens(request, caller, num_sequences):
        headers[RESUMABLE_HEADER] = str(num_prompt_tokens)
    if request.octavo_resume is not None:
        headers[RESUMED_HEADER] = str(len(request.octavo_resume.token_ids))
    return headers


def tells_tokens(request: ChatCompletionRequest | CompletionRequest, caller: Caller, num_sequences: int) -> bool:
    """Whether chunks carry their token ids for the receiver's sake."""
    return caller.may_resume and can_resume(request, num_sequences)


def seed_of(response_id: str) -> int:
    """The seed of an answer whose caller gave none: the same wherever it goes on."""
    return int.from_bytes(hashlib.sha256(response_id.encode()).digest()[:7])
