"""How far a streamed answer has come, so that another replica can go on with it when its own dies.

A replica that supports it tells the tokens of each event (`token_ids`); they are remembered here and hidden from a
client that did not ask for them. The same request plus these tokens gives the rest of the very same answer.
"""

from __future__ import annotations

import re

import msgspec

from octavo_gateway.upstream import ResponseHead

RESUMABLE = b"x-octavo-resumable"
RESUMED = b"x-octavo-resumed"
MAX_RESUMES = 3

# Our own encoder's form. Inside a JSON string every quote has a backslash before it, so text cannot look like this.
_TOKENS = re.compile(rb',"token_ids":\[([0-9,]*)\]')
_IDENTITY = re.compile(rb'"id":"([^"\\]+)",.*?"created":(\d+)')
_FINISHED = re.compile(rb'"finish_reason":"')


class Progress:
    """Of one request. `active` once a replica tells tokens; `shows_tokens` if the client wants to see them."""

    __slots__ = ("_created", "_id", "_tokens", "active", "finished", "prompt_tokens", "resumes", "shows_tokens")

    def __init__(self, *, shows_tokens: bool = False) -> None:
        self.shows_tokens = shows_tokens
        self.active = False
        self.finished = False  # the last token was told
        self.prompt_tokens = 0
        self.resumes = 0
        self._id = b""
        self._created = b""
        self._tokens: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        """Tokens that were told."""
        return sum(part.count(b",") + 1 for part in self._tokens)

    @property
    def can_resume(self) -> bool:
        """Whether another replica can go on now."""
        return self.active and self._id != b"" and not self.finished and self.resumes < MAX_RESUMES

    def begin(self, head: ResponseHead) -> None:
        """A replica has begun to answer."""
        told = head.get(RESUMABLE)
        self.active = told is not None and told.isdigit()
        if self.active and told is not None:
            self.prompt_tokens = int(told)

    def feed(self, events: bytes) -> bytes:
        """Whole events on their way to the client."""
        if not self._id and (identity := _IDENTITY.search(events)) is not None:
            self._id, self._created = identity[1], identity[2]
        found = _TOKENS.findall(events)
        if found:
            self._tokens += [part for part in found if part]
            if _FINISHED.search(events) is not None:
                self.finished = True
            if not self.shows_tokens:
                return _TOKENS.sub(b"", events)
        return events

    def resumed_body(self, body: bytes) -> bytes:
        """The request that makes another replica go on. All other values stay byte for byte as they are."""
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        tokens = b",".join(self._tokens)
        fields["octavo_resume"] = msgspec.Raw(
            b'{"id":"%s","created":%s,"token_ids":[%s]}' % (self._id, self._created, tokens)
        )
        return msgspec.json.encode(fields)
