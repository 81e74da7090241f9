"""A tokenizer for the fake model: one printable character a token."""

from __future__ import annotations

import string
from collections.abc import Sequence

from fake_runner import EOS, VOCAB_SIZE

CHARACTERS = [c for c in string.printable[:95] if c not in "`~^@#"]
assert len(CHARACTERS) == 90


class CharTokenizer:
    """Ids 0 to 89 are characters, the rest special."""

    vocab_size = VOCAB_SIZE
    bos_token_id = None
    eos_token_ids = frozenset({EOS})
    special_token_ids = frozenset(range(90, VOCAB_SIZE))
    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [CHARACTERS.index(c) for c in text if c in CHARACTERS]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(CHARACTERS[token] for token in token_ids if token < 90)

    def token_text(self, token_id: int) -> str:
        return CHARACTERS[token_id] if token_id < 90 else f"<{token_id}>"

    def token_bytes(self, token_id: int) -> bytes:
        return self.token_text(token_id).encode()

    def apply_chat_template(self, messages: object, **_options: object) -> str:
        raise AssertionError("these tests render no chat")
