"""What servers and detokenizers ask of a tokenizer; loaded by `octavo_engine.tokenizer.load.load_tokenizer(path)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """Text <-> ids for one model. Implementations are thread-safe for encode and decode."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a generation (eos, end-of-turn)."""

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def encode_pair(self, first: str, second: str, *, max_length: int = 0) -> tuple[list[int], int]:
        """(token ids of both texts as the model joins pairs, where the second's type starts or 0).

        max_length: the second text is cut so that no more tokens come out; 0 cuts nothing.
        """

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_text(self, token_id: int) -> str:
        """The token as shown in logprobs; bytes that are no valid UTF-8 alone come as `bytes:\\xNN`."""

    def token_bytes(self, token_id: int) -> bytes: ...

    @property
    def chat_template(self) -> str | None: ...

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
        """Render messages with the model's own Jinja template in a sandbox.

        Raises `InvalidRequestError` when the template refuses the messages or the model has none.
        """
