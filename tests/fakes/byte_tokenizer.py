"""A tokenizer whose tokens are bytes, with a beginning and an end token: small, exact, and hard on UTF-8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from octavo_engine.errors import InvalidRequestError

BOS, EOS = 256, 257
TEMPLATE = "<{{role}}>{{content}}"


class ByteTokenizer:
    vocab_size = 258
    bos_token_id: int | None = BOS
    eos_token_ids = frozenset({EOS})
    special_token_ids = frozenset({BOS, EOS})
    chat_template: str | None = TEMPLATE

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = list(text.encode())
        return [BOS, *ids] if add_special_tokens else ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        special = {BOS: "<s>", EOS: "</s>"}
        data = b""
        for token in token_ids:
            if token < 256:
                data += bytes([token])
            elif not skip_special_tokens:
                data += special[token].encode()
        return data.decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        if token_id >= 256:
            return {BOS: "<s>", EOS: "</s>"}[token_id]
        return chr(token_id) if token_id < 128 else f"bytes:\\x{token_id:02x}"

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        if messages[0]["role"] == "tool":
            raise InvalidRequestError("messages[0]: a conversation cannot begin with a tool's answer")
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        if tools:
            text = f"<tools>{len(tools)}" + text
        return text + ("<assistant>" if add_generation_prompt else "")
